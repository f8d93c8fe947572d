"""Intervals as result files have them."""

from collections.abc import Mapping
from typing import Any

from ..evaluation import Interval


def is_interval(value: Any) -> bool:
    """Whether a value of a file is an interval."""
    return isinstance(value, Mapping) and {"estimate", "low", "high"} <= value.keys()


def as_interval(value: Mapping[str, Any]) -> Interval:
    """An interval from a file.

    Raises:
        KeyError: If a part of it is missing.
        ValueError: If an end is no number.
    """
    null, p_value = value.get("null"), value.get("p_value")
    return Interval(
        float(value["estimate"]),
        float(value["low"]),
        float(value["high"]),
        float(value["confidence"]),
        int(value["num_documents"]),
        int(value["seed"]),
        None if null is None else float(null),
        None if p_value is None else float(p_value),
    )
