"""Writers remove only the files of the checkpoint that they replace."""

import json

import pytest

from symphony_hf.files import replacing_folder, weight_files_of

OTHERS = ["model-ema.safetensors", "model_best.safetensors", "model.safetensors.bak", "notes.txt"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in [*OTHERS, *shards, "config.json", "tokenizer.model"]:
        (folder / name).write_text(name)
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": "notes.txt"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_text("png")
    (folder / "link").symlink_to("notes.txt")
    return folder


def test_shards_are_known_by_their_index_alone(folder):
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert weight_files_of(folder) == {*shards, "model.safetensors.index.json"}
    (folder / "model.safetensors.index.json").write_text("{")
    assert weight_files_of(folder) == {"model.safetensors.index.json"}


def test_a_replaced_folder_keeps_files_that_are_not_of_the_checkpoint(folder):
    with replacing_folder(folder) as written:
        (written / "model.safetensors").write_text("new")
        (written / "config.json").write_text("new")
    expected = {*OTHERS, "plots", "link", "model.safetensors", "config.json"}
    assert {path.name for path in folder.iterdir()} == expected
    assert all((folder / name).read_text() == name for name in OTHERS)
    assert (folder / "plots" / "loss.png").read_text() == "png"
    assert (folder / "link").is_symlink()
    assert (folder / "config.json").read_text() == "new"


def test_nothing_is_lost_if_the_new_folder_fails(folder):
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="broken off"), replacing_folder(folder):
        raise ValueError("broken off")
    assert {path.name for path in folder.iterdir()} == before
