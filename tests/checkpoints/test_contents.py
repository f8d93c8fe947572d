"""What leaves the machine: safetensors and text; no pickle, no code, no secret, whatever it is called."""

import json
import pickle
import zipfile

import pytest
import torch
from hub_server import TOKEN
from models import make_model
from pushed import make_run
from transformers import LlamaConfig, LlamaForCausalLM

from symphony_hf import ConfigError, GraphError, PushError, push, symphonize
from symphony_hf.checkpoints.folder import open_folder


def archive(path):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("data.pkl", pickle.dumps([1]))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("pytorch_model.bin", lambda f: torch.save({"a": torch.ones(2)}, f), "is a pickle"),
        ("notes.txt", lambda f: f.write_bytes(pickle.dumps({"a": 1})), "is a pickle"),
        ("vocab.json", archive, "is a pickle"),
        ("old.pt", lambda f: f.write_bytes(pickle.dumps([1], protocol=0)), "is of no kind that a model needs"),
        ("modeling_mine.py", lambda f: f.write_text("print(1)"), "is of no kind that a model needs"),
        ("kernel.so", lambda f: f.write_bytes(b"\x7fELF"), "is of no kind that a model needs"),
        ("extra.safetensors", lambda f: f.write_bytes(pickle.dumps([1])), "cannot be read as safetensors"),
        (
            "tokenizer_config.json",
            lambda f: f.write_text('{"auto_map": {"AutoTokenizer": "me.py"}}'),
            "asks for custom code",
        ),
        (
            "tokenizer_config.json",
            lambda f: f.write_text('{"auto\\u005fmap": {"AutoTokenizer": "x"}}'),
            "asks for custom code",
        ),
        ("tokenizer_config.json", lambda f: f.write_text("{"), "is not valid JSON"),
        ("special.json", lambda f: f.write_text("[" * 100_000), "is not valid JSON"),
        ("notes.md", lambda f: f.write_text(f"my token is {TOKEN}"), "contains an access token"),
    ],
)
def test_what_must_not_be_shared_is_refused_by_name(name, spoil, message, checkpoint):
    (checkpoint / "more").mkdir()
    for place in (checkpoint / name, checkpoint / "more" / name):
        spoil(place)
        with pytest.raises(PushError, match=message) as caught:
            open_folder(checkpoint)
        assert str(place) in str(caught.value)
        assert TOKEN not in str(caught.value)
        place.unlink()
    assert open_folder(checkpoint)


def test_links_to_nothing_and_in_circles_are_refused_by_name(checkpoint, tmp_path):
    link = checkpoint / "notes.json"
    for target, message in ((tmp_path / "nothing", "is a link to nothing"), (checkpoint, "a folder that it is in")):
        link.symlink_to(target)
        with pytest.raises(PushError, match=message):
            open_folder(checkpoint)
        link.unlink()


def test_the_results_of_a_run_are_found_where_its_model_is_a_link(model, tmp_path):
    run = make_run(tmp_path, model)
    (run / "final").rename(tmp_path / "elsewhere")
    (run / "final").symlink_to(tmp_path / "elsewhere")
    for directory in (run, run / "final"):
        assert open_folder(directory).results == run / "results.json"


@pytest.mark.parametrize("name", ["final", "symphony"])
def test_a_run_without_results_has_its_model(name, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint.rename(tmp_path / "run" / name)
    folder = open_folder(tmp_path / "run")
    assert folder.path == tmp_path / "run" / name
    assert folder.results is None


def test_the_state_of_a_run_stays(checkpoint):
    for name in ("training_args.bin", "optimizer.pt", "rng_state_1.pth", "trainer_state.json", "zero_to_fp32.py"):
        (checkpoint / name).write_bytes(b"\x80\x04")
    for name in ("checkpoint-12", "global_step12", "runs", ".git"):
        (checkpoint / name).mkdir()
        (checkpoint / name / "something.pt").write_bytes(b"\x80\x04")
    folder = open_folder(checkpoint)
    assert set(folder.files) == {"config.json", "generation_config.json", "model.safetensors"}
    assert len(folder.left_out) == 9


def test_a_header_that_looks_like_a_pickle_is_none(checkpoint):
    """The first bytes of a safetensors file are a length: 640 is what a pickle of protocol 2 begins with."""
    content = (checkpoint / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] + b" " * (0x80 + (2 << 8) + (1 << 16) - size)
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert (checkpoint / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert open_folder(checkpoint).kind == "symphony"


def test_folders_that_are_no_model(tmp_path, checkpoint):
    for directory, message in ((tmp_path / "none", "is not a folder"), (tmp_path, "no model in")):
        with pytest.raises(PushError, match=message):
            push(directory, "me/it")
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    ).save_pretrained(tmp_path / "dense")
    with pytest.raises(PushError, match="names no experts"):
        push(tmp_path / "dense", "me/it")
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(PushError, match="expected an object, got list"):
        push(checkpoint, "me/it")


@pytest.mark.parametrize("make", [lambda: make_model("mixtral"), lambda: symphonize(make_model("mixtral"))])
def test_a_checkpoint_that_lacks_weights(make, tmp_path):
    make().save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    make().save_pretrained(tmp_path / "whole")
    removed = (sorted((tmp_path / "sharded").glob("*.safetensors"))[1], tmp_path / "whole" / "model.safetensors")
    for file in removed:
        assert open_folder(file.parent)
        file.unlink()
        with pytest.raises(PushError, match=rf"`{file.parent}` lacks weights .*{file.name}.*: save the model again"):
            open_folder(file.parent)


def test_a_checkpoint_whose_graphs_cannot_be_read(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "symphony": {"strength": 2}}))
    with pytest.raises(ConfigError, match="`strength` must be between"):
        push(checkpoint, "me/it")
    (checkpoint / "config.json").write_text(json.dumps(config))
    make_model("mixtral").save_pretrained(tmp_path / "plain")
    (checkpoint / "model.safetensors").write_bytes((tmp_path / "plain" / "model.safetensors").read_bytes())
    with pytest.raises(GraphError, match="holds no expert graph"):
        push(checkpoint, "me/it")
    broken = symphonize(make_model("mixtral"))
    broken.model.layers[1].mlp.gate.symphony.adjacency.fill_(-1)
    broken.save_pretrained(checkpoint)
    with pytest.raises(GraphError, match=r"layers\.1.*36 negative"):
        push(checkpoint, "me/it")
