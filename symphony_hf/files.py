"""Atomic writes of files and folders, and JSON that may be truncated or untrusted.

A folder is written in `_symphony_unfinished/` beside its final path, and a file under a hidden name beside its own. It
is flushed to the disk and then renamed. If the process is killed before that, an existing file or folder is unchanged.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, SymphonyError
from .locks import locked

CONFIG, ADAPTER_CONFIG, TOKENIZER_CONFIG = "config.json", "adapter_config.json", "tokenizer_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_RECORD = "symphony_config.json"
"""Name of the file beside an adapter with graphs that says what it needs to be loaded."""

_PARTS = {
    CONFIG: {CONFIG, "generation_config.json"},
    ADAPTER_CONFIG: {ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_RECORD},
    "trainer_state.json": {"trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"},
}
"""Files that prove a checkpoint's kind -> files that its loader reads with them."""

_TOKENIZER_FILES = {
    *("added_tokens.json", "chat_template.jinja", "special_tokens_map.json", "tokenizer.json"),
    *("preprocessor_config.json", "processor_config.json"),
}
"""Files that transformers reads beside any `tokenizer_config.json`, whatever class it names."""
UNFINISHED = "_symphony_unfinished"
"""Name of the folder for unfinished writes. Trainer does not push names that begin with `_` to the Hub."""


def place_to_write(target: Path) -> Path:
    """Return the path to write `target` to at first, whose last part is the same: models use it when they save."""
    return target.parent / UNFINISHED / target.name


def place_of_replaced(target: Path) -> Path:
    """Return the path of the folder that `target` replaces, between the two renames."""
    return place_to_write(target).with_name(f"{target.name}.replaced")


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Write a folder under a temporary name, which is yielded, and rename it when the block ends; remove it on errors.

    A checkpoint at `target` is replaced, other files there stay, and leftovers of a killed process are removed.

    Raises:
        CheckpointError: If another process is writing the same folder.
    """
    folder = place_to_write(target)
    with locked(folder.with_name(f"{target.name}.lock"), target):
        clear(target)
        folder.mkdir(parents=True)
        try:
            yield folder
            finish(target)
        except BaseException:
            clear(target)
            raise


def finish(target: Path, recorded: Collection[str] | None = None) -> None:
    """Move a folder from its `place_to_write` to its final path, replacing an existing checkpoint. Other files stay.

    If the process ends between the two renames, the next `clear` restores the replaced folder. `recorded` are names of
    the replaced checkpoint's files, from its own record; by default, see `stale_files`.
    """
    written, replaced = place_to_write(target), place_of_replaced(target)
    for path in written.rglob("*"):  # before others are kept: it takes long, and more may come meanwhile
        if path.is_file() and not path.is_symlink():
            flush(path)
    _keep_others(target, written, recorded)
    for folder, _, _ in os.walk(written):
        flush(Path(folder))
    if target.exists():
        os.replace(target, replaced)
    os.replace(written, target)
    flush(target.parent)
    with contextlib.suppress(OSError):  # it is removed by the next `clear`
        remove_folder(replaced)
    remove_if_empty(written.parent)


def stale_files(there: Collection[str], written: Collection[str], read: Callable[[str], Path]) -> set[str]:
    """Return the names of an old checkpoint's files that loaders would take for parts of the one that replaces it.

    A file counts only if it is proven to be part of the old checkpoint, never by what its name looks like: users keep
    EMA weights, backups and notes beside a model. The index proves the shards that it names, and each file in `_PARTS`
    those that belong to it. A `tokenizer_config.json` proves the files that transformers reads with it; they are stale
    only if the new checkpoint has a tokenizer of its own: the one that is there may have been saved for it.

    Args:
        there: Names of the files in the folder.
        written: Names of the files of the new checkpoint. Without a model's or an adapter's config, it replaces none.
        read: Maps a name in `there` to a file that can be read.
    """
    parts: set[str] = set()
    if CONFIG in written or ADAPTER_CONFIG in written:
        parts = {WEIGHTS, WEIGHTS_INDEX} | _shards(there, read)
        parts.update(*(files for proof, files in _PARTS.items() if proof in there))
    if TOKENIZER_CONFIG in written and TOKENIZER_CONFIG in there:
        parts |= _TOKENIZER_FILES | _vocabulary_files(read(TOKENIZER_CONFIG))
    return (parts & set(there)) - set(written)


def _shards(there: Collection[str], read: Callable[[str], Path]) -> set[str]:
    named: Collection[str] = ()
    with contextlib.suppress(ConfigError):  # a broken index proves nothing about any file
        named = read_weight_map(read(WEIGHTS_INDEX), ConfigError).values() if WEIGHTS_INDEX in there else ()
    return {name for name in named if name.endswith(".safetensors")}


def _vocabulary_files(tokenizer_config: Path) -> set[str]:
    transformers = sys.modules.get("transformers")  # imported by every process that has written a tokenizer
    with contextlib.suppress(ConfigError):
        name = str(read_object(tokenizer_config, ConfigError, max_bytes=MAX_CONFIG_BYTES).get("tokenizer_class"))
        return set(getattr(getattr(transformers, name, None), "vocab_files_names", {}).values())
    return set()


def _keep_others(target: Path, written: Path, recorded: Collection[str] | None) -> None:
    """Link or copy what is not part of `target`'s checkpoint, and its mode, into the folder that will replace it."""
    if recorded is None and target.is_dir():
        there, new = ({entry.name for entry in folder.iterdir()} for folder in (target, written))
        recorded = stale_files(there, new, target.joinpath)
    for path in foreign_files(target, recorded or ()):
        kept = written / path.relative_to(target)
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, kept)
    for folder, folders, files in os.walk(target):
        if not folders and not files:
            (written / Path(folder).relative_to(target)).mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.copymode(target, written)


def foreign_files(folder: Path, ours: Collection[str]) -> list[Path]:
    """Return the files and links in a folder whose names, relative to it, are not in `ours`."""
    walked = [Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*files, *folders)]
    found = [path for path in walked if path.is_symlink() or not path.is_dir()]
    return [path for path in found if path.relative_to(folder).as_posix() not in ours]


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target, follow_symlinks=False)


def clear(target: Path) -> None:
    """Remove the leftovers of a killed write to `target`, and restore the folder that it was replacing."""
    written, replaced = place_to_write(target), place_of_replaced(target)
    if os.path.lexists(replaced) and not os.path.lexists(target):
        os.replace(replaced, target)
    for left in filter(os.path.lexists, (replaced, written)):
        remove_folder(left)
    remove_if_empty(target.parent / UNFINISHED)


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one, but not what a link points to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON atomically: a reader finds the old file or the complete new one."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically: a reader finds the old file or the complete new one."""
    with replacing(path) as written:
        written.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, which is yielded, and rename it when the block ends; remove it on errors.

    Its folder is created if necessary. The temporary name is unique across nodes. The file must be closed by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield written
        flush(written)
        os.replace(written, path)
        flush(path.parent)
    finally:
        written.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with contextlib.suppress(OSError):  # it has files, or another process was faster
        folder.rmdir()


MAX_CONFIG_BYTES = 8 * 2**20
"""Maximum size of an untrusted config file."""


def read_object(
    file: Path, error: type[SymphonyError], *, hint: str = "", max_bytes: int | None = None
) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Args:
        file: Path of the file.
        error: Class of the error to raise.
        hint: Advice for a missing or invalid file, for the error message.
        max_bytes: Maximum size of an untrusted file.

    Raises:
        SymphonyError: An `error`, if the file cannot be read, is too large, or does not contain an object.
    """
    then = f": {hint}" if hint else ""
    try:
        with file.open("rb") as opened:
            content = opened.read() if max_bytes is None else opened.read(max_bytes + 1)
    except FileNotFoundError as problem:
        raise error(f"`{file}` is missing{then}") from problem
    except OSError as problem:
        raise error(f"`{file}` cannot be read ({problem.strerror or problem}){then}") from problem
    if max_bytes is not None and len(content) > max_bytes:
        raise error(f"`{file}` has more than {max_bytes:,} bytes: none of its kind needs that")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise error(f"`{file}` is no JSON, or half of one ({problem}){then}") from problem
    if not isinstance(values, dict):
        raise error(f"`{file}`: expected an object, got {type(values).__name__}")
    return values


def read_weight_map(index: Path, error: type[SymphonyError]) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name -> name of a safetensors file beside the index.

    Raises:
        SymphonyError: An `error`, if the index cannot be read, names no files, or names files in other folders.
    """
    files = read_object(index, error, hint="so it is no index of safetensors files").get("weight_map")
    is_named = isinstance(files, dict) and all(isinstance(file, str) for file in files.values())
    if not is_named or not files or any(Path(file).name != file for file in files.values()):
        raise error(f"`{index}` is no index of safetensors files: `weight_map` must name files beside it")
    return files
