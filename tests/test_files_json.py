"""The reader of JSON objects: what it gives, and what each thing that is wrong is called."""

import pytest

from symphony_hf.errors import ConfigError, ReportError
from symphony_hf.files import read_object, read_weight_map


def test_an_object_is_read_whole(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"name": "é", "values": [1, null]}', encoding="utf-8")
    size = file.stat().st_size
    for max_bytes in (None, size, size + 1):
        assert read_object(file, ConfigError, max_bytes=max_bytes) == {"name": "é", "values": [1, None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing: run it again"),
        (b'{"half": ', "is no JSON, or half of one .*: run it again"),
        (b"\xff\xfe{}\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
    ],
)
@pytest.mark.parametrize("error", [ConfigError, ReportError])
def test_what_is_wrong_is_said_by_the_given_error(content, message, error, tmp_path):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=rf"a\.json`:? {message}"):
        read_object(file, error, hint="run it again")


def test_a_folder_in_its_place_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_object(tmp_path, ConfigError)


def test_no_more_is_read_than_allowed(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{" + " " * 20 + "}")
    with pytest.raises(ConfigError, match=r"^`[^`]*` has more than 21 bytes"):
        read_object(file, ConfigError, max_bytes=21)
    assert read_object(file, ConfigError, max_bytes=22) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is no JSON.*so it is no index of safetensors files"),
        ("{}", "`weight_map` must name files beside it"),
        ('{"weight_map": {}}', "`weight_map` must name files beside it"),
        ('{"weight_map": ["a.safetensors"]}', "`weight_map` must name files beside it"),
        ('{"weight_map": {"a": 1}}', "`weight_map` must name files beside it"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "`weight_map` must name files beside it"),
    ],
)
def test_an_index_names_files_beside_it(content, message, tmp_path):
    file = tmp_path / "index.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_weight_map(file, ConfigError)
    file.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert read_weight_map(file, ConfigError) == {"a": "1.safetensors", "b": "2.safetensors"}
