"""The page of the routing subpackage names functions that it exports."""

import re
from pathlib import Path

import symphony_hf.routing


def test_the_functions_of_the_table_are_exported():
    page = (Path(symphony_hf.routing.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and line.count("|") == 4]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[3])}
    assert len(named) >= 8
    assert named <= set(symphony_hf.routing.__all__)
