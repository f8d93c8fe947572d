"""Bad input: a clear error, and not one byte written beside the source."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from dense import files_of, make_dense, run, save_dense
from safetensors.torch import load_file, save_file

from symphony_hf import CheckpointError, ConfigError, UpcycleError
from symphony_hf.conversion.upcycling import target as target_module
from symphony_hf.conversion.upcycling.families import QWEN2_MOE
from symphony_hf.conversion.upcycling.target import writing
from symphony_hf.conversion.upcycling.writing import Contents

INDEX = "model.safetensors.index.json"


def refused(error, match, folder, source, **options):
    """Check that upcycling raises this error and leaves no file behind."""
    before = files_of(folder), sorted(folder.rglob("*"))
    with pytest.raises(error, match=match):
        run(source, folder / "moe", **options)
    assert (files_of(folder), sorted(folder.rglob("*"))) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 4, "num_experts": 3}, "`top_k` is 4, but there are only 3 experts"),
        ({"top_k": 0}, "`top_k` must be a whole number of at least 1"),
        ({"num_experts": 1}, "`num_experts` must be a whole number of at least 2"),
        ({"layers": [1, 4]}, "0 to 3"),
        ({"layers": [-1]}, "0 to 3"),
        ({"layers": [1, 1]}, "once each"),
        ({"layers": []}, "0 to 3"),
        ({"layers": "even"}, "`every-other`"),
        ({"router_std": 0.0}, "`router_std` must be above 0"),
        ({"router_std": float("nan")}, "`router_std`"),
        ({"router_init": "norml"}, "did you mean `normal`"),
        ({"noise": -0.1}, "`noise`"),
        ({"seed": -1}, "`seed`"),
        ({"dtype": "bf16"}, "`dtype`"),
        ({"max_shard_size": "5 apples"}, "`max_shard_size`"),
    ],
)
def test_options_out_of_range(options, match, tmp_path):
    _, source = save_dense(tmp_path / "dense")
    refused(ConfigError, match, tmp_path, source, **options)


@pytest.mark.parametrize(
    ("kind", "to", "match"),
    [
        ("phi3", "phimoe", "do not sum to 1.*take `mixtral` or `qwen2_moe`"),
        ("qwen2", "mixtral", "neither biases"),
        ("qwen3", "qwen2_moe", "no norms on queries and keys"),
        ("granite", "mixtral", "no multipliers"),
        ("mistral", "mixtrl", "did you mean `mixtral`"),
    ],
)
def test_containers_that_cannot_be_exact(kind, to, match, tmp_path):
    _, source = save_dense(tmp_path / "dense", kind)
    refused(UpcycleError, match, tmp_path, source, to=to)


@pytest.mark.parametrize(
    ("kind", "overrides", "options", "match"),
    [
        ("phi3", {"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor: 0.5"),
        ("llama", {"attention_bias": True}, {}, "`attention_bias: True`"),
        ("llama", {"mlp_bias": True}, {}, "`mlp_bias: True`"),
        ("phi3", {"resid_pdrop": 0.1}, {}, "`resid_pdrop: 0.1`"),
        ("mistral", {}, {"to": "mixtral", "layers": [1]}, "every layer of `mixtral` has experts, and 1 of 4"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            {},
            "2 of the 4 layers .* sliding window of 5 tokens",
        ),
    ],
)
def test_settings_that_the_container_cannot_express(kind, overrides, options, match, tmp_path):
    _, source = save_dense(tmp_path / "dense", kind, **overrides)
    refused(UpcycleError, match, tmp_path, source, **options)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized"),
        ({"model_type": "mixtral"}, "is a MoE already"),
        ({"num_local_experts": 8}, "is a MoE already .*num_local_experts: 8"),
        ({"model_type": "gpt2"}, "is a `gpt2`; the families that can be upcycled are granite"),
    ],
)
def test_models_that_are_not_dense_decoders(values, match, tmp_path):
    _, source = save_dense(tmp_path / "dense")
    change_config(source, **values)
    refused(UpcycleError, match, tmp_path, source)


def test_a_config_that_transformers_refuses(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    for values in ({"hidden_size": "wide"}, {"rope_parameters": 3}):
        change_config(source, **values)
        refused(CheckpointError, "config.json`: transformers refuses it", tmp_path, source)


def test_tied_weights_that_differ(tmp_path):
    _, source = save_dense(tmp_path / "dense", "llama")  # its head is another matrix than its embedding
    change_config(source, tie_word_embeddings=True)
    refused(UpcycleError, "`lm_head.weight` and `model.embed_tokens.weight` are stored and differ", tmp_path, source)


def test_weights_in_eight_bits(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors")
    refused(UpcycleError, "as I8: is it quantized", tmp_path, source)


def sharded(folder):
    _, source = save_dense(folder / "dense", max_shard_size="40KB")
    return source, json.loads((source / INDEX).read_text()), sorted(source.glob("*.safetensors"))


def test_a_shard_that_is_missing(tmp_path):
    source, _, shards = sharded(tmp_path)
    shards[1].unlink()
    refused(CheckpointError, f"{shards[1].name}` is missing", tmp_path, source)


@pytest.mark.parametrize("left", [0, 4, 200, -1])
def test_a_shard_that_is_cut_off(left, tmp_path):
    source, _, shards = sharded(tmp_path)
    shards[0].write_bytes(shards[0].read_bytes()[:left])
    refused(CheckpointError, f"{shards[0].name}` cannot be read as safetensors", tmp_path, source)


def test_an_index_that_is_not_of_these_shards(tmp_path):
    source, index, shards = sharded(tmp_path)
    places = index["weight_map"]
    name = next(name for name, file in places.items() if file == shards[0].name)
    for changed, match in [
        ({**places, name: shards[1].name}, f"has `{name}`, but"),
        ({**places, "model.more.weight": shards[0].name}, "has no `model.more.weight`"),
        ({key: file for key, file in places.items() if key != name}, "does not know it"),
        ({**places, name: f"../{shards[0].name}"}, "must name files beside it"),
        ({}, "must name files beside it"),
    ]:
        (source / INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(CheckpointError, match, tmp_path, source)
    (source / INDEX).write_text("[")
    refused(CheckpointError, "is no index", tmp_path, source)


def test_tensors_that_are_not_those_of_the_config(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, source / "model.safetensors")
    refused(CheckpointError, r"`model\.norm\.weight` is missing", tmp_path, source)
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, source / "model.safetensors")
    refused(CheckpointError, r"is \[31\] instead of \[32\]", tmp_path, source)
    save_file({**tensors, "model.norm.weight": norm, "value_head": norm.clone()}, source / "model.safetensors")
    refused(CheckpointError, "`value_head` is unexpected", tmp_path, source)


def test_files_that_are_no_checkpoint(tmp_path):
    model, source = save_dense(tmp_path / "dense")
    shutil.copytree(source, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    refused(CheckpointError, r"only pickle files \(pytorch_model.bin\)", tmp_path, tmp_path / "pickled")
    (source / INDEX).write_text("{}")
    refused(CheckpointError, "delete the one that is stale", tmp_path, source)
    (source / "config.json").unlink()
    refused(CheckpointError, "config.json` is missing", tmp_path, source)
    refused(CheckpointError, "no such folder", tmp_path, tmp_path / "nowhere")


def test_a_target_that_would_harm_something(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.txt").write_text("years of work")
    refused(UpcycleError, "exists: give another one", tmp_path, source)
    refused(UpcycleError, "holds no model, so it is not overwritten", tmp_path, source, overwrite=True)
    with pytest.raises(UpcycleError, match="must not be in one another"):
        run(source, source / "moe")


def test_a_model_of_the_hub_is_downloaded_only_if_it_can_be_upcycled(tmp_path, monkeypatch):
    """First the target must be free; then the config alone is downloaded, and then the files of that commit."""
    _, source = save_dense(tmp_path / "dense")
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, "model.safetensors" in allow_patterns))
        snapshot = tmp_path / "snapshots" / "c0ffee"
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in {path for pattern in allow_patterns for path in source.glob(pattern)}:
            shutil.copyfile(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "thesis.txt").write_text("years of work")
    with pytest.raises(UpcycleError, match="exists: give another one"):
        run("somebody/dense", tmp_path / "moe")
    assert asked == []
    for options, error in (({"to": "phimoe"}, UpcycleError), ({"layers": [9]}, ConfigError)):
        with pytest.raises(error):
            run("somebody/dense", tmp_path / "new", revision="main", **options)
    assert asked == [("somebody/dense", "main", False)] * 2
    asked.clear()
    run("somebody/dense", tmp_path / "new", revision="main")
    assert asked == [("somebody/dense", "main", False), ("somebody/dense", "c0ffee", True)]


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    _, source = save_dense(tmp_path / "dense")
    run(source, tmp_path / "whole")
    size = sum(len(content) for content in files_of(tmp_path / "whole").values())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage(size - 1))
    refused(CheckpointError, "GB free: make room", tmp_path, source)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage(size + 2 * 2**20))
    run(source, tmp_path / "moe")


def test_another_process_writes_the_same_target(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    with writing(tmp_path / "moe"):
        with pytest.raises(CheckpointError, match="another process is writing"):
            run(source, tmp_path / "moe")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"moe` could not be written: `.*gone`: No such file"):
        with writing(tmp_path / "moe"):
            (tmp_path / "gone").read_bytes()
    assert not (tmp_path / "moe").exists()


def test_the_check_sees_a_container_that_computes_something_else(tmp_path, monkeypatch):
    _, source = save_dense(tmp_path / "dense")
    monkeypatch.setitem(QWEN2_MOE.settings, "norm_topk_prob", False)  # the chosen weights no longer sum to 1
    refused(UpcycleError, "differ from the dense model's by", tmp_path, source, to="qwen2_moe")


def test_the_check_sees_an_expert_that_is_no_copy(tmp_path, monkeypatch):
    _, source = save_dense(tmp_path / "dense")
    blocks = Contents.blocks

    def with_one_wrong_byte(contents, tensor):
        for block in blocks(contents, tensor):
            if tensor.name == "model.layers.2.mlp.experts.1.up_proj.weight":
                block = memoryview(bytes([block[0] ^ 1]) + bytes(block[1:]))
            yield block

    monkeypatch.setattr(Contents, "blocks", with_one_wrong_byte)
    match = "layer 2: `mlp.up_proj` of expert 1 is not that of expert 0"
    refused(UpcycleError, match, tmp_path, source, to="qwen2_moe")


def test_a_dense_model_that_computes_no_numbers(tmp_path):
    model = make_dense("mistral")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    model.save_pretrained(tmp_path / "dense")
    refused(UpcycleError, "not finite", tmp_path, tmp_path / "dense")
