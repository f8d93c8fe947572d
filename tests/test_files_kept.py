"""Writers remove only the files of the checkpoint that they replace."""

import json

import pytest

from symphony_hf.files import replacing_folder, stale_files

OTHERS = ["model-ema.safetensors", "model_best.safetensors", "model.safetensors.bak", "notes.txt"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in [*OTHERS, *SHARDS, "config.json", "tokenizer.model"]:
        (folder / name).write_text(name)
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": "notes.txt"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_text("png")
    (folder / "link").symlink_to("notes.txt")
    (folder / "outside").symlink_to("../results")
    (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "results").write_text("results")
    return folder


def stale(folder, *written):
    return stale_files([path.name for path in folder.iterdir()], written, folder.joinpath)


def test_shards_are_known_by_their_index_alone(folder):
    assert stale(folder, "config.json", "model.safetensors") == {*SHARDS, "model.safetensors.index.json"}
    (folder / "model.safetensors.index.json").write_text("{")
    assert stale(folder, "config.json", "model.safetensors") == {"model.safetensors.index.json"}


def test_a_folder_without_a_checkpoint_replaces_none(folder):
    assert stale(folder, "notes.md", "text.txt") == set()


def test_an_adapter_and_a_model_replace_each_other(folder):
    """Loaders prefer the adapter, whose base is another model."""
    weights = stale(folder, "config.json")
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    assert stale(folder, *adapter) == weights | {"config.json"}
    (folder / adapter[1]).write_text("weights")
    assert stale(folder, "config.json") == weights  # of nothing that could be loaded
    (folder / adapter[0]).write_text("{}")
    assert stale(folder, "config.json") == weights | set(adapter)


def test_tokenizer_files_are_known_by_the_tokenizers_config(folder):
    """And they are stale only where another tokenizer would be read with them."""
    names = ["tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "special_tokens_map.json"]
    for name in names:
        (folder / name).write_text(name)
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    weights = stale(folder, "config.json")
    assert stale(folder, "config.json", *tokenizer) == weights  # no tokenizer_config.json in the folder: no proof
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SomebodysTokenizer"}))
    assert stale(folder, "config.json") == weights
    always = {"chat_template.jinja", "special_tokens_map.json"}
    assert stale(folder, "config.json", *tokenizer) == weights | always
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert stale(folder, "config.json", *tokenizer) == weights | always | {"vocab.json", "merges.txt"}


def test_a_generation_config_is_stale_beside_another_model(folder):
    (folder / "generation_config.json").write_text("{}")
    assert "generation_config.json" in stale(folder, "config.json")
    assert "generation_config.json" not in stale(folder, "config.json", "generation_config.json")
    (folder / "config.json").unlink()
    assert "generation_config.json" not in stale(folder, "config.json")


def test_a_replaced_folder_keeps_files_that_are_not_of_the_checkpoint(folder):
    with replacing_folder(folder) as written:
        (written / "model.safetensors").write_text("new")
        (written / "config.json").write_text("new")
    links = {"link": "notes.txt", "outside": "../results", "dangling": "nowhere"}
    expected = {*OTHERS, *links, "plots", "model.safetensors", "config.json", "tokenizer.model"}
    assert {path.name for path in folder.iterdir()} == expected
    assert all((folder / name).read_text() == name for name in OTHERS)
    assert (folder / "plots" / "loss.png").read_text() == "png"
    assert {name: str((folder / name).readlink()) for name in links} == links
    assert (folder / "outside").read_text() == "results"
    assert (folder / "config.json").read_text() == "new"


def test_a_replaced_folder_keeps_its_mode_and_its_empty_folders(folder):
    (folder / "logs" / "inner").mkdir(parents=True)
    folder.chmod(0o700)
    with replacing_folder(folder) as written:
        (written / "config.json").write_text("new")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "logs" / "inner").is_dir()


def test_nothing_is_lost_if_the_new_folder_fails(folder):
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="broken off"), replacing_folder(folder):
        raise ValueError("broken off")
    assert {path.name for path in folder.iterdir()} == before
