"""Names of this package's functions in its docstrings and comments."""

import pkgutil
import re
from pathlib import Path

import pytest

import symphony_hf

ADDRESS = re.compile(r"`((?:diagnostics|evaluation)(?:\.[A-Za-z_]\w*)+)")


def test_a_name_in_a_docstring_is_that_of_something():
    found = {
        (path.name, address)
        for path in Path(symphony_hf.__file__).parent.rglob("*.py")
        for address in ADDRESS.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 5
    for name, address in sorted(found):
        try:
            pkgutil.resolve_name(f"symphony_hf.{address}")
        except (AttributeError, ImportError):
            pytest.fail(f"{name} names `{address}`, which does not exist")
