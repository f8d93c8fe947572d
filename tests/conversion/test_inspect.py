"""symphony inspect: counts against numbers worked out by hand, and types as stored and in memory."""

import http.server
import json
import threading

import peft
import pytest
import torch
from models import make_llava, make_model
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from typer.testing import CliRunner

from symphony_hf import ConfigError, DataError, inspect_model, print_inspection, symphonize
from symphony_hf.checkpoints.model_class import empty_model
from symphony_hf.cli import app
from symphony_hf.conversion.inspection.counts import TypeCount, stored_types
from symphony_hf.conversion.inspection.inspect import readable_bytes
from symphony_hf.conversion.inspection.parts import Anatomy, Part, Routing
from symphony_hf.conversion.inspection.tensors import bare_name, held_tensors
from symphony_hf.experiments.conformance.tiny import moe_families, tiny_model, why_not_built

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
PHI3_UPCYCLED = {  # Phi-3-mini in a Qwen2-MoE container, every other MLP in four copies
    "model_type": "qwen2_moe",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "moe_intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True,
}


def described(config, tmp_path):
    """Return a model that is only a config.json, as on the Hub."""
    fields = dict(config)
    file = tmp_path / "config.json"
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(tmp_path)
    return file


def by_part(inspection):
    return {part.part: (part.total, part.active) for part in inspection.parts}


def test_mixtral_8x7b(tmp_path):
    """46.7B parameters, 12.9B active."""
    inspection = inspect_model(described(MIXTRAL_8X7B, tmp_path))
    of_expert = 3 * 4096 * 14336
    experts, active = 32 * 8 * of_expert, 32 * 2 * of_expert
    embeddings = 2 * 32000 * 4096
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    norms = (2 * 32 + 1) * 4096
    routers = 32 * 8 * 4096
    assert by_part(inspection) == {
        Part.EMBEDDINGS: (embeddings, embeddings),
        Part.ATTENTION: (attention, attention),
        Part.ROUTERS: (routers, routers),
        Part.EXPERTS: (experts, active),
        Part.NORMS: (norms, norms),
    }
    assert inspection.total == 46_702_792_704
    assert inspection.active == 12_879_925_248
    assert inspection.routers == {Routing(8, 2): 32}
    assert inspection.types is None
    assert inspection.settings is None


def test_olmoe_1b_7b(tmp_path):
    """6.9B parameters, 1.3B active."""
    inspection = inspect_model(described(OLMOE_1B_7B, tmp_path))
    rest = 2 * 50304 * 2048 + 16 * (4 * 2048 * 2048 + 64 * 2048 + 4 * 2048) + 2048  # with norms of queries and keys
    of_expert = 3 * 2048 * 1024
    assert inspection.total == rest + 16 * 64 * of_expert == 6_919_161_856
    assert inspection.active == rest + 16 * 8 * of_expert == 1_282_017_280
    assert inspection.routers == {Routing(64, 8): 16}


def test_qwen3_30b_a3b(tmp_path):
    """30.5B parameters, 3.3B active."""
    inspection = inspect_model(described(QWEN3_30B_A3B, tmp_path))
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512
    rest = 2 * 151936 * 2048 + 48 * (attention + 128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    of_expert = 3 * 2048 * 768
    assert inspection.total == rest + 48 * 128 * of_expert == 30_532_122_624
    assert inspection.active == rest + 48 * 8 * of_expert == 3_353_032_704


def test_phi_3_mini_upcycled(tmp_path):
    """Phi-3-mini has 3,821,079,552 parameters.

    Each of 16 layers adds three copies of the MLP, a router, and Qwen2-MoE's gate of a shared expert that is not there.
    """
    inspection = inspect_model(described(PHI3_UPCYCLED, tmp_path))
    of_expert = 3 * 3072 * 8192
    routers, gates = 16 * 4 * 3072, 16 * 3072
    assert 3_821_079_552 + 16 * 3 * of_expert + routers == 7_445_154_816
    assert inspection.total == 7_445_154_816 + gates
    assert inspection.active == 3_821_079_552 + 16 * of_expert + routers + gates
    parts = by_part(inspection)
    assert parts[Part.EXPERTS] == (16 * 4 * of_expert, 16 * 2 * of_expert)
    assert parts[Part.DENSE_MLPS] == (16 * of_expert, 16 * of_expert)
    assert parts[Part.SHARED_EXPERTS] == (gates, gates)
    assert inspection.routers == {Routing(4, 2): 16}


def test_llava(tmp_path):
    model = make_llava()
    model.save_pretrained(tmp_path)
    inspection = inspect_model(tmp_path)
    wanted = {Part.EMBEDDINGS, Part.ATTENTION, Part.ROUTERS, Part.EXPERTS, Part.NORMS, Part.VISION, Part.PROJECTOR}
    assert {part.part for part in inspection.parts} == wanted
    counts = {part: total for part, (total, _) in by_part(inspection).items()}
    assert counts[Part.VISION] == sum(p.numel() for p in model.model.vision_tower.parameters())
    assert counts[Part.PROJECTOR] == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert inspection.total == model.num_parameters()


FAMILIES = [f for f in moe_families() if why_not_built(f) is None]
QUICK = {"mixtral", "qwen2_moe", "jetmoe", "gemma4", "longcat_flash", "granitemoehybrid", "nllb-moe", "doge"}


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_every_family_is_taken_apart(family):
    """Every parameter counts once, and routers, experts and the modules beside them are told apart."""
    model = tiny_model(family)
    inspection = inspect_model(model)
    parts = by_part(inspection)
    assert inspection.total == model.num_parameters()
    assert Part.EMBEDDINGS in parts
    assert Part.ATTENTION in parts
    if family in ("doge", "diffusion_gemma"):  # whose routers cannot be patched
        assert not inspection.routers
        return
    assert set(parts) >= {Part.ROUTERS, Part.EXPERTS, Part.NORMS}
    total, active = parts[Part.EXPERTS]
    assert active is not None
    top_k, num_experts = (1, 8) if family in ("llama4", "llama4_text", "switch_transformers", "zaya") else (2, 8)
    # LongCat has rows in one weight for experts that do nothing; ZAYA's has no parameters.
    assert active == total * top_k // num_experts or family == "longcat_flash"
    shared = any(part in name for name, _ in model.named_modules() for part in ("shared_exp", "shared_mlp"))
    assert (Part.SHARED_EXPERTS in parts) == shared or family in ("jetmoe", "muse_spark")
    has_vision = getattr(model.config, "vision_config", None) is not None
    assert (Part.VISION in parts) == has_vision


# Types.


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_types_as_stored(tmp_path, max_shard_size):
    model = symphonize(make_model(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    graphs = 3 * 64
    numbers = model.num_parameters()
    updates = 3  # of each graph, an int64
    inspection = inspect_model(tmp_path)
    assert inspection.types == [
        TypeCount("bfloat16", numbers, 2 * numbers),
        TypeCount("float32", graphs, 4 * graphs),
        TypeCount("int64", updates, 8 * updates),
    ]
    assert inspection.settings["strength"] == 1.0
    assert by_part(inspection)[Part.GRAPHS] == (graphs, graphs)
    held = inspect_model(model)
    assert held.types == inspection.types[:2]
    assert held.parts == inspection.parts


def test_types_of_a_stored_4_bit_checkpoint(tmp_path):
    """bitsandbytes packs two numbers per byte, and stores the constants beside them."""
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(
        {
            name: torch.zeros(512, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.zeros(16, dtype=torch.uint8),
            f"{name}.nested_absmax": torch.zeros(1),
            f"{name}.quant_map": torch.zeros(16),
            f"{name}.nested_quant_map": torch.zeros(256),
            f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
            "model.norm.weight": torch.zeros(32, dtype=torch.float16),
            "mask": torch.zeros(3, dtype=torch.bool),
        },
        tmp_path / "model.safetensors",
    )
    assert stored_types(tmp_path) == [
        TypeCount("nf4", 1024, 512 + 16 + 4 + 64 + 1024 + 80),
        TypeCount("float16", 32, 64),
        TypeCount("bool", 3, 3),
    ]


def test_a_checkpoint_that_is_not_whole(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="is the checkpoint complete"):
        inspect_model(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="is the checkpoint complete"):
        inspect_model(tmp_path)


def test_weights_that_are_no_safetensors(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert inspect_model(tmp_path).types is None


# Where from.


class Hub(http.server.BaseHTTPRequestHandler):
    """A model repository as the Hub serves one, which counts the bytes of weights that it served."""

    folder = None
    sent = 0

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.rpartition("/resolve/main/")[2]
        file = type(self).folder / name
        if "/resolve/main/" not in self.path or not file.exists():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        content = file.read_bytes()
        wanted = self.headers.get("Range")
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", '"tag"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            type(self).sent += len(content) if name.endswith(".safetensors") else 0
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_model_on_the_hub(tmp_path, monkeypatch):
    """Only the headers of its weights are downloaded."""
    import huggingface_hub
    import huggingface_hub.constants as constants

    model = make_model("mixtral", hidden_size=256, intermediate_size=256)
    model.save_pretrained(tmp_path / "repo")
    Hub.folder, Hub.sent = tmp_path / "repo", 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", huggingface_hub.HfApi(address).get_safetensors_metadata
    )
    try:
        config = MixtralConfig.from_pretrained("someone/model", cache_dir=tmp_path / "cache")
        assert config.hidden_size == 256
        types = stored_types("someone/model")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert types == [TypeCount("float32", model.num_parameters(), 4 * model.num_parameters())]
    size = (tmp_path / "repo" / "model.safetensors").stat().st_size
    assert 0 < Hub.sent <= 100_001 < size / 10


def test_a_hub_that_is_not_reached():
    with pytest.raises(ConfigError, match="no config of a model"):
        inspect_model("someone/model")
    with pytest.raises(DataError, match="could not be read from the Hub"):
        stored_types("someone/model")


def test_what_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="no config of a model"):
        inspect_model(tmp_path)
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run` is the folder of a run, not a model: give `.*final`"):
        inspect_model(tmp_path / "run")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter, not a model"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ConfigError, match="no config of a model"):
        inspect_model(tmp_path)
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "encodec"}))
    with pytest.raises(ConfigError):
        empty_model(tmp_path / "nothing.json")


def test_a_dense_model(tmp_path):
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **fields)).save_pretrained(tmp_path)
    inspection = inspect_model(tmp_path)
    assert inspection.total == inspection.active
    assert by_part(inspection)[Part.DENSE_MLPS][0] == 2 * 3 * 32 * 48
    assert not inspection.routers


def test_names_are_the_bare_models():
    assert bare_name("base_model.model.model.layers.0.mlp.gate.modules_to_save.default.weight") == (
        "model.layers.0.mlp.gate.weight"
    )
    assert bare_name("model.layers.0.mlp.experts.parametrizations.down_proj.original") == (
        "model.layers.0.mlp.experts.down_proj"
    )
    assert bare_name("base_model.model.a.base_layer.lora_A.default.weight") == "a.lora_A.default.weight"
    assert bare_name("model.original.weight") == "model.original.weight"
    assert bare_name("base_model.model") == ""
    assert bare_name("base_model.modelling.weight") == "base_model.modelling.weight"


@pytest.mark.parametrize("symphonizes", [False, True])
@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING"])
@pytest.mark.filterwarnings("ignore:PROMPT_TUNING has no place for the graphs")
def test_a_model_in_pefts_wrapper(kind, symphonizes):
    model = symphonize(make_model()) if symphonizes else make_model()
    bare = inspect_model(model)
    config = {
        "LORA": peft.LoraConfig(target_modules=["q_proj"], r=2),
        "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]
    wrapped = inspect_model(peft.get_peft_model(model, config))
    assert (wrapped.name, wrapped.routers, wrapped.settings) == (bare.name, bare.routers, bare.settings)
    # Three layers of A and B on a 32 x 32 map, and the adapter's own copies of three 8 x 8 graphs; or two prompts.
    added = 3 * 2 * (32 + 32) + 3 * 64 * symphonizes if kind == "LORA" else 2 * 32
    assert wrapped.total == bare.total + added


def test_an_anatomy_finds_each_parameters_owners():
    anatomy = Anatomy(symphonize(make_model("qwen2_moe")))
    (held,) = (t for t in held_tensors(anatomy.modules[""]) if t.name == "model.layers.1.mlp.gate.symphony.adjacency")
    assert anatomy.part_of(held) is Part.GRAPHS
    assert [path for path, _ in anatomy.owners(held.name)] == [
        "model.layers.1.mlp.gate.symphony",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp",
        "model.layers.1",
        "model.layers",
        "model",
        "",
    ]


# In print.


def test_the_tables(tmp_path):
    model = symphonize(make_model(dtype=torch.bfloat16), strength=0.5)
    console = Console(record=True, width=120)
    print_inspection(inspect_model(model), console)
    text = console.export_text()
    for word in ("OlmoeForCausalLM", "experts", "active per token", "bfloat16", "top-3 of 8 experts", "strength=0.5"):
        assert word in text
    print_inspection(inspect_model(tiny_model("diffusion_gemma")), console)
    assert "unknown" in console.export_text()


@pytest.mark.parametrize(("size", "text"), [(1, "1 B"), (2048, "2.00 KiB"), (3 * 2**30 // 2, "1.50 GiB")])
def test_bytes_in_words(size, text):
    assert readable_bytes(size) == text


def test_the_command(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "MixtralForCausalLM" in result.output
    assert "3 routers: top-2 of 6 experts" in result.output
    for arguments, message in (
        (["--output", "x.json"], "--output is for --four_bit"),
        (["--four-bit", "--output", str(tmp_path)], "is a folder, and the result is a file"),
    ):
        wrong = CliRunner().invoke(app, ["inspect", str(tmp_path), *arguments])
        assert isinstance(wrong.exception, ConfigError)
        assert message in str(wrong.exception)
        assert not wrong.output


def test_the_command_on_a_recipe(tmp_path):
    pytest.importorskip("bitsandbytes")
    recipe = tmp_path / "recipe.yaml"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = json.dumps({"model_type": "olmoe", **sizes})
    recipe.write_text(f"model:\n  config: {config}\nsymphony: {{strength: 0.5}}\n")
    output = tmp_path / "bytes.json"
    result = CliRunner().invoke(app, ["inspect", str(recipe), "--four-bit", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "strength=0.5" in result.output
    plan = json.loads(output.read_text())
    assert plan["model"] == "OlmoeForCausalLM"
    assert plan["bytes"]["experts in 4 bits"] < plan["bytes"]["bfloat16"]
