"""Options of an upcycling: experts, top-k, routers, noise, types and file sizes; and the copied files."""

import math
import shutil

import pytest
import torch
from dense import VOCAB, files_of, load, logits, make_dense, run, save_dense
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from symphony_hf import SymphonyWarning, UpcycleError, upcycle

pytestmark = pytest.mark.filterwarnings("ignore:upcycle. .* of this `qwen2_moe`")  # settings that llama.cpp ignores

ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("phi3"))[1]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 4), (8, 2)])
def test_experts_and_top_k(num_experts, top_k, source, tmp_path):
    run(source, tmp_path / "moe", num_experts=num_experts, top_k=top_k)
    model = load(tmp_path / "moe")
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (num_experts, top_k)
    expected = logits(load(source))
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 rounds by about 1e-7


def test_the_same_seed_gives_the_same_bytes(source, tmp_path):
    options = {"noise": 0.1, "layers": "every-other"}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        run(source, tmp_path / name, seed=seed, **options)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
    first, other = weights(tmp_path / "first"), weights(tmp_path / "other")
    for name, tensor in first.items():
        random = ".experts." in name or name.endswith("mlp.gate.weight")
        assert torch.equal(tensor, other[name]) != random, name


def test_a_router_does_not_depend_on_which_other_layers_have_one(source, tmp_path):
    run(source, tmp_path / "all", to="qwen2_moe", layers="all", check=False)
    run(source, tmp_path / "one", layers=[1], check=False)
    every, one = weights(tmp_path / "all"), weights(tmp_path / "one")
    assert torch.equal(every[ROUTER], one[ROUTER])
    routers = [every[ROUTER.replace("1", str(layer))] for layer in range(4)]
    assert not any(torch.equal(routers[0], router) for router in routers[1:])


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_the_distribution_of_the_routers(init, source, tmp_path):
    run(source, tmp_path / "moe", num_experts=256, router_init=init, router_std=0.5, layers=[1], check=False)
    router = weights(tmp_path / "moe")[ROUTER]
    assert router.shape == (256, 32)
    # 8,192 draws: the deviation of their mean is 0.0055, and that of their deviation below 0.004.
    assert abs(router.mean()) < 0.025
    assert abs(router.std() - 0.5) < 0.02
    inside = (router.abs() <= math.sqrt(3) * 0.5).float().mean()
    assert inside == 1 if init == "uniform" else 0.88 < inside < 0.95  # 0.917 of a normal distribution


def test_noise_has_the_size_that_was_asked_for_and_is_each_experts_own(source, tmp_path):
    with pytest.warns(SymphonyWarning, match="does not compute exactly"):
        result = upcycle(source, tmp_path / "moe", num_experts=3, noise=0.25, layers=[1])
    assert result.exactness is None
    assert any("does not compute exactly" in note for note in result.notes)
    found, dense = weights(tmp_path / "moe"), weights(source)
    gate, up = dense["model.layers.1.mlp.gate_up_proj.weight"].chunk(2)
    down = dense["model.layers.1.mlp.down_proj.weight"]
    for part, exact in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        size = exact.square().mean().sqrt()
        noise = [found[f"model.layers.1.mlp.experts.{expert}.{part}.weight"] - exact for expert in range(3)]
        for own in noise:
            # 1,536 draws: their deviation is within 2% of the true one, once in a thousand within 6%.
            assert abs(own.std() / size - 0.25) < 0.02
        assert not torch.equal(noise[0], noise[1])
        # Noise of two experts that was drawn alike would have a correlation of 1, instead of about 0.03.
        assert abs(torch.corrcoef(torch.stack(noise).flatten(1))[0, 1]) < 0.15
    for name, tensor in found.items():
        if "layers.1.mlp" not in name and name in dense:
            assert torch.equal(tensor, dense[name]), name


def test_without_a_check_nothing_is_said_of_exactness(source, tmp_path):
    assert run(source, tmp_path / "moe", check=False).exactness is None


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_weights_are_cast_on_request(stored, dtype, tmp_path):
    dense, source = save_dense(tmp_path / "dense", "qwen3", dtype=getattr(torch, stored))
    result = run(source, tmp_path / "moe", dtype=dtype)
    assert result.exactness.difference <= result.exactness.tolerance  # against the dense weights, cast alike
    found = weights(tmp_path / "moe")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    expected = dense.model.layers[0].mlp.gate_proj.weight.to(getattr(torch, dtype))
    assert torch.equal(found["model.layers.0.mlp.experts.2.gate_proj.weight"], expected)
    assert load(tmp_path / "moe").config.dtype == getattr(torch, dtype)


def test_values_that_a_type_cannot_hold_are_refused(tmp_path):
    dense, source = save_dense(tmp_path / "dense", "mistral")
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    dense.save_pretrained(source)
    with pytest.raises(UpcycleError, match=r"layers.0.mlp.up_proj.* float16 cannot hold"):
        run(source, tmp_path / "moe", dtype="float16")
    assert not (tmp_path / "moe").exists()


def test_a_model_in_the_target_is_replaced_only_on_request(source, tmp_path):
    run(source, tmp_path / "moe", num_experts=2)
    (tmp_path / "moe" / "model-00001-of-00002.safetensors").write_bytes(b"of another model")
    run(source, tmp_path / "moe", num_experts=4, overwrite=True)
    assert load(tmp_path / "moe").config.num_experts == 4
    # No index names it, so it is not known to be part of the checkpoint that was replaced.
    assert (tmp_path / "moe" / "model-00001-of-00002.safetensors").read_bytes() == b"of another model"


def test_a_single_file_and_an_index_compute_the_same(source, tmp_path):
    save_dense(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    run(tmp_path / "sharded", tmp_path / "one")
    run(source, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_head_that_is_stored_though_it_is_tied(tmp_path):
    dense, source = save_dense(tmp_path / "dense", "llama, tied and scaled")
    stored = weights(source)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    run(source, tmp_path / "moe")
    assert "lm_head.weight" not in weights(tmp_path / "moe")
    assert torch.allclose(logits(load(tmp_path / "moe")), logits(dense), atol=1e-4)


def make_tokenizer():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="c", pad_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def test_tokenizer_chat_template_generation_config_and_license_are_carried(tmp_path):
    model, source = make_dense("mistral"), tmp_path / "dense"
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.3, eos_token_id=[2, 3])
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("of the dense model")
    (source / "training_args.bin").write_bytes(b"")
    run(source, tmp_path / "moe")
    before, after = files_of(source), files_of(tmp_path / "moe")
    assert after.keys() == before.keys() - {"README.md", "training_args.bin"}
    for file in after.keys() - {"config.json", "model.safetensors"}:
        assert after[file] == before[file], file
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer("a c b")["input_ids"] == [1, 3, 2]
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert load(tmp_path / "moe").generation_config.temperature == 0.3


def test_the_same_class_reads_the_tokenizer(tmp_path):
    """The class depends on the model's family if the tokenizer's config does not name one."""
    _, source = save_dense(tmp_path / "dense", "qwen2")
    make_tokenizer().save_pretrained(source)
    file = source / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"TokenizersBackend"', '"Qwen2Tokenizer"'))
    run(source, tmp_path / "moe")
    found, expected = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "moe", source))
    assert type(found) is type(expected)
    assert found("a b")["input_ids"] == expected("a b")["input_ids"]


def test_a_tokenizer_without_a_config_of_its_own(tmp_path):
    """Numbers are whole for the backend of Mistral's, and Qwen2's own class would take them apart."""
    _, source = save_dense(tmp_path / "dense", "mistral")
    words = Tokenizer(models.BPE({"<unk>": 0, "1": 1, "2": 2, "12": 3}, [("1", "2")], unk_token="<unk>"))
    words.save(str(source / "tokenizer.json"))
    run(source, tmp_path / "moe", to="qwen2_moe")
    for folder in (source, tmp_path / "moe"):
        assert AutoTokenizer.from_pretrained(folder)("12")["input_ids"] == [3]
    assert list(tmp_path.glob("*/tokenizer_config.json")) == [tmp_path / "moe" / "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer_config.json", "{"), ("tokenizer.json", "{}"), ("tokenizer.json", "[]")]
)
def test_a_tokenizer_that_cannot_be_read_is_carried_and_said(source, tmp_path, name, text):
    shutil.copytree(source, tmp_path / "dense")
    (tmp_path / "dense" / name).write_text(text)
    result = run(tmp_path / "dense", tmp_path / "moe")
    assert any("tokenizer's files were copied, but could not be read" in note for note in result.notes)
    assert (tmp_path / "moe" / name).read_text() == text


@pytest.mark.parametrize(("kind", "said"), [("phi3, longrope", "longrope"), ("phi3, windows", "FlashAttention")])
def test_what_a_user_should_know_is_said(kind, said, tmp_path):
    _, source = save_dense(tmp_path / "dense", kind)
    with pytest.warns(SymphonyWarning, match=said):
        result = upcycle(source, tmp_path / "moe", to="qwen2_moe", num_experts=2)
    assert any(said in note for note in result.notes)
    assert load(tmp_path / "moe").config.vocab_size == VOCAB
