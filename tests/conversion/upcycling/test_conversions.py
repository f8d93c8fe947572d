"""Each dense family in each of its containers: read by the stock class, it computes what the dense model computes."""

import json

import pytest
import torch
from dense import load, logits, run, save_dense
from safetensors import safe_open
from safetensors.torch import load_file

from symphony_hf import symphonize
from symphony_hf.patching.engines import engine_warnings
from symphony_hf.patching.symphonize import symphony_routers

CASES = [
    ("mistral", "mixtral", "all"),
    ("mistral, windows and wide heads", "mixtral", "all"),
    ("mistral", "qwen2_moe", "every-other"),
    ("llama", "mixtral", "all"),
    ("llama, tied and scaled", "mixtral", "all"),
    ("llama, tied and scaled", "qwen2_moe", [0, 3]),
    ("qwen2", "qwen2_moe", "all"),
    ("qwen2, tied and scaled", "qwen2_moe", "every-other"),
    ("qwen2, windows", "qwen2_moe", [2]),
    ("qwen3", "qwen3_moe", "all"),
    ("qwen3, biases", "qwen3_moe", [0, 1]),
    ("granite", "granitemoe", "all"),
    ("phi3", "qwen2_moe", "every-other"),
    ("phi3", "mixtral", "all"),
    ("phi3, windows", "qwen2_moe", [0, 2, 3]),
    ("phi3, windows", "mixtral", "all"),
    ("phi3, longrope", "qwen2_moe", "every-other"),
    ("phi3, longrope", "mixtral", "all"),
]
NUMBERS = {"all": [0, 1, 2, 3], "every-other": [1, 3]}
EXPERTS = 3
PARTS = ("gate", "up", "down")


def assert_same_logits(found, expected):
    # Float32 rounds the sum of the chosen experts, whose weights sum to 1 but for its last bit, by about 1e-7.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def split_projections(dense):
    """Return the dense model's weights by name, with Phi-3's fused projections split as in its own forward."""
    config, weights = dense.config, {}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    for name, weight in dense.state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", weight.split([queries, keys, keys]), strict=True):
                weights[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
                weights[name.replace("gate_up_proj", part)] = rows
        else:
            weights[name] = weight
    return weights


def find_experts(layer):
    """Return the module that holds a layer's stacked experts."""
    (experts,) = [module for name, module in layer.named_modules() if name.endswith(".experts")]
    return experts


@pytest.mark.parametrize(("kind", "to", "layers"), CASES)
def test_the_logits_are_the_dense_models(kind, to, layers, tmp_path):
    dense, source = save_dense(tmp_path / "dense", kind)
    result = run(source, tmp_path / "moe", to=to, layers=layers, num_experts=EXPERTS)
    model = load(tmp_path / "moe")
    assert model.config.model_type == to == result.model_type
    assert list(result.layers) == NUMBERS.get(str(layers), layers)
    routers = [name for name, _ in symphony_routers(symphonize(load(tmp_path / "moe")))]
    assert [int(name.split(".")[2]) for name in routers] == list(result.layers)
    for length in (3, 12, 40):
        assert_same_logits(logits(model, length), logits(dense, length))
    assert result.exactness is not None
    assert 0 < result.exactness.difference <= result.exactness.tolerance


@pytest.fixture(scope="module", params=CASES, ids=str)
def upcycled(request, tmp_path_factory):
    """Upcycle a bfloat16 checkpoint from several files to several files; (dense model, layers, folder, result)."""
    kind, to, layers = request.param
    folder = tmp_path_factory.mktemp("upcycled")
    dense, source = save_dense(folder / "dense", kind, dtype=torch.bfloat16, max_shard_size="40KB")
    assert (source / "model.safetensors.index.json").exists()
    options = {"to": to, "layers": layers, "num_experts": EXPERTS, "max_shard_size": "60KB"}
    return dense, folder / "moe", run(source, folder / "moe", check=False, **options)


def test_every_copy_is_bit_for_bit(upcycled):
    dense, folder, result = upcycled
    model = load(folder)
    assert model.dtype == torch.bfloat16
    found, expected = model.state_dict(), split_projections(dense)
    for layer in result.layers:
        gate, up, down = (expected.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in PARTS)
        experts = find_experts(model.model.layers[layer])
        for expert in range(EXPERTS):
            assert torch.equal(experts.gate_up_proj[expert], torch.cat([gate, up]))
            assert torch.equal(experts.down_proj[expert], down)
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.weight_bytes == 2 * result.parameters


def test_the_files_are_those_of_the_stock_class(upcycled, tmp_path):
    _, folder, result = upcycled
    load(folder).save_pretrained(tmp_path)
    found, expected = {}, load_file(tmp_path / "model.safetensors")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 60_000
        with safe_open(file, "pt") as opened, safe_open(tmp_path / "model.safetensors", "pt") as stock:
            assert opened.metadata() == stock.metadata()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert result.files == len(list(folder.glob("*.safetensors"))) > 1
    for file in ("config.json", "generation_config.json"):
        assert json.loads((folder / file).read_text()) == json.loads((tmp_path / file).read_text())


def test_the_index_is_that_of_the_stock_class(tmp_path):
    _, source = save_dense(tmp_path / "dense", "mistral")
    run(source, tmp_path / "moe", max_shard_size="60KB", check=False)
    load(tmp_path / "moe").save_pretrained(tmp_path / "stock", max_shard_size="60KB")
    found, expected = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("moe", "stock")
    )
    assert found["metadata"] == expected["metadata"]
    assert found["weight_map"].keys() == expected["weight_map"].keys()
    for name, file in found["weight_map"].items():  # which file has which tensor is each writer's own choice
        with safe_open(tmp_path / "moe" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


def test_one_file_is_byte_for_byte_that_of_the_stock_class(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    run(source, tmp_path / "moe", layers="every-other")
    load(tmp_path / "moe").save_pretrained(tmp_path / "stock")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "moe" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes(), file


def test_types_within_a_checkpoint_stay_as_they_are(tmp_path):
    dense, source = save_dense(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    for name, module in dense.named_modules():
        if name.endswith("norm"):
            module.float()
    dense.save_pretrained(source)
    run(source, tmp_path / "moe", to="qwen2_moe")
    for name, tensor in load_file(tmp_path / "moe" / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_the_type_to_load_it_in_is_that_of_the_dense_model(dtype, tmp_path):
    """Or, where its config names none, that of most of the weights; never that of the LM head alone."""
    dense, source = save_dense(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    dense.lm_head.float()
    dense.save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "moe", check=False)
    assert load(tmp_path / "moe").dtype == getattr(torch, dtype or "bfloat16")


def test_a_window_that_the_family_does_not_have_is_ignored(tmp_path):
    """As the family itself does."""
    dense, source = save_dense(tmp_path / "dense", "llama")
    config = json.loads((source / "config.json").read_text()) | {"sliding_window": 5}
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "moe", to="mixtral")
    upcycled = load(tmp_path / "moe")
    assert upcycled.config.sliding_window is None
    expected = logits(dense)
    assert (logits(upcycled) - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 rounds by about 1e-7


@pytest.mark.parametrize(("kind", "to"), [("phi3", "qwen2_moe"), ("llama", "mixtral"), ("granite", "granitemoe")])
def test_it_generates_what_the_dense_model_does(kind, to, tmp_path):
    dense, source = save_dense(tmp_path / "dense", kind)
    run(source, tmp_path / "moe", to=to)
    prompt = torch.tensor([[5, 6, 7, 8]])
    texts = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        for model in (dense, load(tmp_path / "moe"))
    ]
    assert texts[0].shape[1] > 4
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("kind", "to"), [("phi3", "qwen2_moe"), ("mistral", "mixtral"), ("granite", "granitemoe"), ("qwen3", "qwen3_moe")]
)
def test_symphony_begins_as_the_upcycled_model(kind, to, tmp_path):
    _, source = save_dense(tmp_path / "dense", kind)
    run(source, tmp_path / "moe", to=to)
    before = logits(load(tmp_path / "moe"))
    model = symphonize(load(tmp_path / "moe"))
    assert torch.equal(logits(model), before)  # the graph of no counts is the identity, to the bit
    for _, router in symphony_routers(model):
        assert torch.equal(router.symphony.transition(), torch.eye(3))


def test_the_default_is_a_container_that_servers_compute_right(tmp_path):
    """All layers become Mixtral; where some stay dense, Qwen2-MoE, with all tensors that servers ask of it."""
    _, source = save_dense(tmp_path / "dense", "llama")
    assert run(source, tmp_path / "all", check=False).model_type == "mixtral"
    assert run(source, tmp_path / "half", layers="every-other", check=False).model_type == "qwen2_moe"
    config = load(tmp_path / "half").config
    assert (config.qkv_bias, config.shared_expert_intermediate_size) == (True, 16)
    assert [text for text in engine_warnings(config) if "vLLM" in text] == []
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    added = [name for name in tensors if name.endswith("bias") or "shared_expert" in name]
    assert len(added) == 4 * 3 + 2 * 4  # biases in every layer, a shared expert in the sparse ones
    assert not any(tensors[name].any() for name in added)


def test_a_shared_expert_of_zeros_stays_zero_in_training(tmp_path):
    _, source = save_dense(tmp_path / "dense")
    run(source, tmp_path / "moe", layers="every-other", check=False)
    model = load(tmp_path / "moe").train()
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    shared = [parameter for name, parameter in model.named_parameters() if "shared_expert" in name]
    assert len(shared) == 2 * 4
    assert not any(parameter.grad.any() for parameter in shared)


def test_the_experts_part_when_they_are_trained(tmp_path):
    _, source = save_dense(tmp_path / "dense", "mistral")
    run(source, tmp_path / "moe", to="mixtral")
    model = load(tmp_path / "moe").train()
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        gradient = layer.mlp.experts.down_proj.grad
        assert not torch.equal(gradient[0], gradient[1])
        assert layer.mlp.gate.weight.grad is not None


PUBLISHED = {  # what no test above has: as the Hub has these configs, written by older transformers
    "Phi-3-mini-4k": ("phi3", 64, {"rope_scaling": None, "original_max_position_embeddings": 64, "sliding_window": 31}),
    "Phi-3.5-mini": (
        "phi3",
        512,
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
            "original_max_position_embeddings": 16,
            "sliding_window": 1024,
        },
    ),
}


@pytest.mark.parametrize("to", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_in_its_published_form(name, to, tmp_path):
    """It has code in `auto_map`, which is neither run nor copied, and settings under their old names."""
    kind, positions, settings = PUBLISHED[name]
    _, source = save_dense(tmp_path / "dense", kind, num_key_value_heads=4)
    file = source / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"max_position_embeddings": positions, "rope_theta": 10_000.0, "torch_dtype": "float32", **settings}
    config |= {"attention_bias": False, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
    config |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "transformers_version": "4.40.2", "_name_or_path": name}
    file.write_text(json.dumps(config))
    dense = load(source)  # by the stock class, which reads the old names
    result = run(source, tmp_path / "moe", to=to, layers="every-other" if to == "qwen2_moe" else "all")
    assert result.exactness.difference <= result.exactness.tolerance
    moe = load(tmp_path / "moe")
    assert "auto_map" not in json.loads((tmp_path / "moe" / "config.json").read_text())
    for length in (12, 40):  # on both sides of what the window and the rotations begin at
        assert_same_logits(logits(moe, length), logits(dense, length))
