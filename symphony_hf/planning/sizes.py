"""Sizes as people write them."""

import re

from ..errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Read a size: `80GB`, `79.6 GiB`, `512 MB`. A GB is 10^9 bytes, a GiB 2^30.

    Raises:
        ConfigError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"`{text}` is no size: expected a number above 0 and a unit, such as 80GB or 79.6GiB")
    return round(float(match[1]) * _UNITS[match[2]])
