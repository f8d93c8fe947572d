"""Which files a model on the Hub is made of, and what is never shared: pickles, code, and secrets."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import PushError

_SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".png", ".svg", ".yaml", ".yml"}
_NAMES = {"LICENSE", "NOTICE", ".gitattributes"}
_STAYS = {
    r"training_args\.bin|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth": "a pickle of Trainer's state",
    r"trainer_state\.json|symphony_checkpoint\.json|results?\.json|report\.(json|md)": "of the run, not of the model",
    r"global_step\d+|latest|zero_to_fp32\.py": "DeepSpeed's state",
    r"checkpoint-\d+(\..*)?|runs|logs|_symphony_unfinished": "of the run, not of the model",
    r"\.git|\.cache|\.gitignore|\.DS_Store|__pycache__": "of the machine, not of the model",
}
_PICKLE = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")  # a bare pickle, or torch's archive of one
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_TEXT = (".json", ".txt", ".md", ".jinja", ".yaml", ".yml", "")


def is_wanted(entry: Path) -> str | None:
    """Why a file or folder is no part of the model; None where it may be one."""
    return next((reason for pattern, reason in _STAYS.items() if re.fullmatch(pattern, entry.name)), None)


def check_contents(files: Mapping[str, Path]) -> None:
    """Refuse what must not be shared, by what is in the files and not by their names alone.

    Args:
        files: Name in the repository -> file.

    Raises:
        PushError: If one is a pickle, code, of a kind that no model needs, or has an access token in it; it names it.
    """
    for name, file in files.items():
        if file.suffix == ".safetensors":
            _check_safetensors(file)
            continue
        with file.open("rb") as opened:
            if _PICKLE.match(opened.read(4)):
                raise PushError(f"`{file}` is a pickle, which can run anything when it is loaded: save as safetensors")
        if file.suffix not in _SUFFIXES and file.name not in _NAMES:
            raise PushError(
                f"`{file}` is of no kind that a model needs ({', '.join(sorted(_SUFFIXES))}): move it out of the folder"
            )
        if file.suffix in _TEXT:
            _check_text(name, file)


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise PushError(f"`{file}` cannot be read as safetensors ({error}): is it truncated?") from error


def _check_text(name: str, file: Path) -> None:
    text = file.read_text(encoding="utf-8", errors="replace")
    if _TOKEN.search(text):
        raise PushError(f"`{file}` has an access token of the Hub in it: take it out, and revoke it if it was shared")
    if file.suffix != ".json":
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PushError(f"`{file}` is no JSON: {error}") from error
    if isinstance(values, dict) and values.get("auto_map"):
        raise PushError(f"`{file}` asks for code of its own (`auto_map`), and code is not pushed: `{name}` must not")
