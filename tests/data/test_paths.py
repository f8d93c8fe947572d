"""A table's path is a path, and not a pattern, whatever is in it."""

import json

import pytest

from symphony_hf.data.datasets import load_table, open_table


@pytest.mark.parametrize("name", ["run[1].jsonl", "run?.jsonl", "*.jsonl"])
def test_signs_of_a_pattern_are_part_of_a_name(name, tmp_path):
    for number, file in enumerate((name, "run1.jsonl")):
        (tmp_path / file).write_text(json.dumps({"text": f"text {number}"}) + "\n")
    assert load_table(tmp_path / name)["text"][:] == ["text 0"]
    assert [row["text"] for row in open_table(tmp_path / name)] == ["text 0"]
