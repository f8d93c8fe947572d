"""Text of an estimate with its interval. It stands alone because ablation, theory and evidence share it."""

from collections.abc import Mapping
from typing import Any


def interval_text(values: Mapping[str, Any], digits: int, scale: float = 1, sign: str = "", unit: str = "") -> str:
    """Format an estimate with its interval, or alone where one seed gives none.

    Args:
        values: `estimate`, `low` and `high`, as of `SeedInterval`.
        digits: Number of decimals.
        scale: Factor of all three numbers, such as 100 for percentages.
        sign: `+` to show the sign of a positive estimate.
        unit: Unit after the estimate.
    """
    text = f"{scale * values['estimate']:{sign}.{digits}f}{unit}"
    if values["low"] is None:
        return text
    return f"{text} [{scale * values['low']:.{digits}f}, {scale * values['high']:.{digits}f}]"
