"""Files that another process wrote, or half wrote: nothing is believed before it was looked at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ReportError
from ..evaluation import Interval


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ReportError: If it cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"report: `{file}`: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"report: `{file}` is no JSON, or half of one ({error}): run its command again") from error
    if not isinstance(values, dict):
        raise ReportError(f"report: `{file}`: expected an object, got {type(values).__name__}")
    return values


def is_interval(value: Any) -> bool:
    """Whether a value of a file is an interval."""
    return isinstance(value, Mapping) and {"estimate", "low", "high"} <= value.keys()


def as_interval(value: Mapping[str, Any]) -> Interval:
    """An interval from a file.

    Raises:
        KeyError: If a part of it is missing.
        ValueError: If an end is no number.
    """
    null = value.get("null")
    return Interval(
        float(value["estimate"]),
        float(value["low"]),
        float(value["high"]),
        float(value["confidence"]),
        int(value["num_documents"]),
        int(value["seed"]),
        None if null is None else float(null),
    )
