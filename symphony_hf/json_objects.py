"""The object in a JSON file that another process wrote, half wrote, or somebody else made."""

import json
from pathlib import Path
from typing import Any

from .errors import SymphonyError

MAX_CONFIG_BYTES = 8 * 2**20
"""Of a config from somebody else: none needs that much."""


def read_object(
    file: Path, error: type[SymphonyError], *, hint: str = "", max_bytes: int | None = None
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: The file.
        error: What to raise.
        hint: What to do about a file that is not there or no JSON, for the message.
        max_bytes: No more is read, of a file from somebody else.

    Raises:
        SymphonyError: The given kind, if the file cannot be read, is larger, or holds something else.
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
    """The index of a checkpoint in several safetensors files: tensor -> name of a file beside the index.

    Args:
        index: The file.
        error: What to raise.

    Raises:
        SymphonyError: The given kind, if it cannot be read, or names no files, or such as are elsewhere.
    """
    places = read_object(index, error, hint="so it is no index of safetensors files").get("weight_map")
    is_named = isinstance(places, dict) and all(isinstance(file, str) for file in places.values())
    if not is_named or not places or any(Path(file).name != file for file in places.values()):
        raise error(f"`{index}` is no index of safetensors files: `weight_map` must name files beside it")
    return places
