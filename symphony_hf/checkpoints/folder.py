"""Inspection of a model folder before an upload: its model, and the files that belong to it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import GraphError, NoGraphError, PushError
from symphony_hf.files import ADAPTER_CONFIG, ADAPTER_RECORD, ADAPTER_WEIGHTS, CONFIG, read_object

from .auto_classes import auto_class_of
from .graph_files import checkpoint_files, read_usable_graphs
from .hub_names import hub_name
from .marks import unmark

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


def reason_to_leave_out(entry: Path) -> str | None:
    """Return the reason why a file or folder is not part of the model; None if it may be part of it."""
    return next((reason for pattern, reason in _STAYS.items() if re.fullmatch(pattern, entry.name)), None)


def check_contents(files: Mapping[str, Path]) -> None:
    """Refuse files that must not be shared, by their content and not by their names alone.

    Args:
        files: File of each name in the repository.

    Raises:
        PushError: If a file is a pickle, code, or of a kind that no model needs, or contains an access token.
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
        raise PushError(f"`{file}` contains an access token of the Hub: remove it, and revoke it if it was shared")
    if file.suffix != ".json":
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PushError(f"`{file}` is not valid JSON: {error}") from error
    if isinstance(values, dict) and values.get("auto_map"):
        raise PushError(f"`{file}` asks for custom code (`auto_map`), which is not pushed: remove it from `{name}`")


Kind = Literal["symphony", "plain", "adapter"]
_WIKITEXT = "wikitext_moe"
_RUNS = {"final": "results.json", "symphony": "report.json", "folded": "report.json", "plain": "report.json"}
"""Model folders of a run (recipe or quickstart) -> file beside them with the run's results, once there are any."""


@dataclass(frozen=True)
class ModelFolder:
    """Model on disk, as it is pushed.

    Attributes:
        path: Folder with the config.
        kind: `symphony`: model with graphs. `plain`: model without graphs, folded or not. `adapter`: PEFT adapter.
        config: Config of the model, or of the adapter.
        settings: Settings of the graphs, if the config has them.
        graphs: Adjacency of each router, or of each router of the model that was folded, if known; otherwise empty.
        files: File of each name in the repository.
        left_out: Reason for each file that is not pushed.
        results: File with the results of a run.
        base_model: Name on the Hub of the base model, as far as the adapter's config or the loaded model tells.
    """

    path: Path
    kind: Kind
    config: Mapping[str, Any]
    settings: SymphonyConfig | None
    graphs: Mapping[str, Tensor]
    files: Mapping[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict)
    results: Path | None = None
    base_model: str | None = None

    @property
    def has_our_modules(self) -> bool:
        """Whether only this package has its modules: it was made by `upcycle_modules`, or is the WikiText model."""
        return "upcycled" in self.config or self.config.get("model_type") == _WIKITEXT

    @property
    def auto_class(self) -> str:
        """Auto class that loads the model, or the base model of an adapter, as far as it is known.

        The named class itself, if no Auto class has it.
        """
        has_images = "vision_config" in self.config
        if self.kind != "adapter":
            class_name = next(iter(self.config.get("architectures") or ()), None)
            return auto_class_of(class_name, self.config.get("model_type"), has_images=has_images)
        model_type = None
        if ADAPTER_RECORD in self.files:
            model_type = read_object(self.files[ADAPTER_RECORD], PushError).get("model_type")
        class_name = (self.config.get("auto_mapping") or {}).get("base_model_class")
        return auto_class_of(class_name, model_type, self.config.get("task_type"), has_images=has_images)


def open_folder(directory: str | Path) -> ModelFolder:
    """Open the folder of a checkpoint, an adapter or a run, and refuse files that must not be shared.

    Args:
        directory: Folder with a `config.json` or an `adapter_config.json`, or folder of a run with its model in
            `final/` or, for the quickstart, in `symphony/`.

    Raises:
        PushError: If there is no model, one of its files is a pickle, code, or of a kind that no model needs, or its
            weights are missing.
        ConfigError: If the settings of the graphs cannot be read.
        GraphError: If the graphs cannot be read.
    """
    path, results = _find(Path(directory))
    is_adapter = (path / ADAPTER_CONFIG).exists()
    name = ADAPTER_CONFIG if is_adapter else CONFIG
    config = unmark(read_object(path / name, PushError), path / name)
    stored = config.get("symphony")
    settings = None if stored is None else SymphonyConfig.from_stored(stored, where=f"{path / name}: symphony")
    if not is_adapter and settings is None and not _names_experts(config):
        raise PushError(f"push: `{path / 'config.json'}` names no experts: it is not a mixture of experts")
    files, left_out = _sort(path)
    check_contents(files)
    if not is_adapter:
        _check_weights(path)
    return ModelFolder(
        path=path,
        kind="adapter" if is_adapter else "plain" if settings is None else "symphony",
        config=config,
        settings=settings,
        graphs=_graphs(path, is_adapter, settings),
        files=files,
        left_out=left_out,
        results=results,
        base_model=hub_name(config.get("base_model_name_or_path")),
    )


def _check_weights(path: Path) -> None:
    try:
        checkpoint_files(path)
    except GraphError as error:
        raise PushError(f"push: `{path}` lacks weights ({error}): save the model again") from error


def _names_experts(config: Mapping[str, Any]) -> bool:
    return any(
        "expert" in name or (isinstance(value, Mapping) and _names_experts(value)) for name, value in config.items()
    )


def _find(directory: Path) -> tuple[Path, Path | None]:
    """Return the folder of the model and the file with the results of its run."""
    if not directory.is_dir():
        raise PushError(f"push: `{directory}` is not a folder: give the folder of a checkpoint, an adapter or a run")
    for path in (directory, directory / "final", directory / "symphony"):
        if (path / CONFIG).exists() or (path / ADAPTER_CONFIG).exists():
            measured = [path / "results.json", path / "report.json"]
            for place in (path.absolute(), path.resolve()):  # `final` may be a link to another disk
                if place.name in _RUNS:
                    measured.append(place.parent / _RUNS[place.name])
            return path, next((file for file in measured if file.exists()), None)
    raise PushError(
        f"push: no model in `{directory}`: expected a config.json or an adapter_config.json there, or a run's `final/`"
    )


def _sort(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for entry in sorted(path.iterdir()):
        reason = reason_to_leave_out(entry)
        if reason is not None:
            left_out[entry.name] = reason
        elif not entry.exists():
            raise PushError(f"push: `{entry}` is a link to nothing: mend it, or move it away")
        elif entry.is_dir() and path.resolve().is_relative_to(entry.resolve()):
            raise PushError(f"push: `{entry}` is a link to a folder that it is in: move it away")
        elif entry.is_dir():
            inside, outside = _sort(entry)
            files.update({f"{entry.name}/{name}": file for name, file in inside.items()})
            left_out.update({f"{entry.name}/{name}": why for name, why in outside.items()})
        else:
            files[entry.name] = entry
    return files, left_out


def _graphs(path: Path, is_adapter: bool, settings: SymphonyConfig | None) -> dict[str, Tensor]:
    if not is_adapter:
        return {} if settings is None else read_usable_graphs(path, "push")
    try:
        return read_usable_graphs(path / ADAPTER_WEIGHTS, "push")
    except NoGraphError:
        if settings is not None:
            raise
        return {}  # an adapter of the experts or the attention alone
