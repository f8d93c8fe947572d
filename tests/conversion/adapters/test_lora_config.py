"""lora_config: targets, which are found by structure, and refusals."""

import re
import warnings

import peft
import pytest
import torch
from adapted import adapt, adapted_model
from models import make_config, make_ids, make_llava, make_model
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyWarning,
    UnsupportedModelError,
    load_adapter,
    lora_config,
    symphonize,
)
from symphony_hf.conversion.adapters.lora import plain_lora_config
from symphony_hf.conversion.adapters.record import graphs_in_adapter
from symphony_hf.conversion.adapters.targets import shortest_ends
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.router import SymphonyRouter


def lora_names(model):
    """Return the bare names of what PEFT put LoRA on; a stacked parameter with its own name."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            names.add(path if parameter in (None, "weight") else f"{path}.{parameter}")
    return names


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("mixtral", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("olmoe", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("qwen2_moe", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("jetmoe", {"self_attention.kv_proj"}),  # the rest of its attention are experts, with a router inside
        ("dbrx", {"norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"}),
        (
            "deepseek_v32",  # whose indexer chooses by a top-k, and gets no gradient
            {f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")},
        ),
    ],
)
def test_attention_is_found_by_structure(family, wanted):
    model = symphonize(tiny_model(family))
    adapted = peft.get_peft_model(model, lora_config(model))
    found = lora_names(adapted)
    layer = re.compile(r".*\.(layers|blocks)\.\d+\.")
    layers = {match[0] for name, _ in model.named_parameters() if (match := layer.match(name))}
    assert {layer.sub("", name) for name in found} == wanted
    assert len(found) == len(layers) * len(wanted)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("mixtral", {"experts.gate_up_proj", "experts.down_proj"}),
        ("qwen3_moe", {"experts.gate_up_proj", "experts.down_proj"}),
        ("nemotron_h", {"experts.up_proj", "experts.down_proj"}),
        ("jetmoe", {"input_linear.weight", "output_linear.weight"}),
    ],
)
def test_experts_have_the_familys_own_names(family, ends):
    model = symphonize(tiny_model(family))
    config = lora_config(model, experts=True, attention=False)
    assert set(config.target_parameters) == ends
    adapted = peft.get_peft_model(model, config)
    stacked = {n for n, p in tiny_model(family).named_parameters() if p.dim() == 3 and p.shape[0] == 8}
    assert lora_names(adapted) == {name.removesuffix(".weight") for name in stacked}


def test_experts_with_linear_maps_of_their_own_are_targeted_as_modules():
    model = symphonize(tiny_model("nllb-moe"))
    config = lora_config(model, experts=True, attention=False, dropout=0.1)
    assert config.target_parameters is None
    found = lora_names(peft.get_peft_model(model, config))
    assert found
    assert all(".experts.expert_" in name for name in found)
    assert len(found) == 2 * 8 * sum(isinstance(m, SymphonyRouter) for m in model.modules())


def test_in_llava_the_vision_tower_is_left_alone():
    model = symphonize(make_llava())
    found = lora_names(peft.get_peft_model(model, lora_config(model)))
    assert len(found) == 12
    assert all("language_model" in name for name in found)


@pytest.mark.parametrize("router", ["graph", "train"])
def test_what_is_in_the_adapter_as_a_whole(router):
    """Qwen2-MoE has a `shared_expert_gate`, which PEFT would mistake for `gate`."""
    model = symphonize(make_model("qwen2_moe"))
    adapted = peft.get_peft_model(model, lora_config(model, router=router))
    wrapped = [m for m in adapted.modules() if "modules_to_save" in m._modules]
    kinds = {type(m.modules_to_save["default"]) for m in wrapped}
    assert len(wrapped) == 3
    assert all(issubclass(kind, SymphonyRouter if router == "train" else ExpertGraph) for kind in kinds)
    assert graphs_in_adapter(adapted, "default") == router
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert all("shared_expert_gate" not in name for name in trained)
    assert len(trained) == (3 if router == "train" else 0)


def test_it_is_a_stock_config():
    config = lora_config(symphonize(make_model()), r=8, dropout=0.1, use_rslora=True, bias="lora_only")
    assert type(config) is peft.LoraConfig
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert config.use_rslora
    assert config.task_type == "CAUSAL_LM"
    assert "save_pretrained" not in config.to_dict()
    assert lora_config(symphonize(make_model()), alpha=3, task_type="FEATURE_EXTRACTION").task_type == (
        "FEATURE_EXTRACTION"
    )
    assert lora_config(symphonize(tiny_model("nllb-moe"))).task_type == "SEQ_2_SEQ_LM"
    assert lora_config(symphonize(make_llava())).task_type is None


TASKS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "score"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "score"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_head_of_a_task_is_trained_and_saved(task, tmp_path):
    """It is new where the base was trained on text, so another load of the base has another one."""
    auto_class, head = TASKS[task]
    make_model("mixtral").save_pretrained(tmp_path / "base")

    def load(seed):
        torch.manual_seed(seed)
        return auto_class.from_pretrained(tmp_path / "base").eval()

    adapted = adapt(symphonize(load(1))).eval()
    config = adapted.peft_config["default"]
    assert config.task_type == task
    assert {name for name, p in adapted.named_parameters() if p.requires_grad and ".lora_" not in name} == {
        f"base_model.model.{head}.modules_to_save.default.{kind}"
        for kind in dict(getattr(load(1), head).named_parameters())
    }
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(load(2), tmp_path / "adapter")
    ours, others = (model(make_ids(), use_cache=False).to_tuple() for model in (loaded, adapted))
    assert all(map(torch.equal, ours, others))
    baseline = {"router": "graph", "experts": False, "attention": True, "r": 4, "alpha": 8, "dropout": 0.0}
    plain = plain_lora_config(load(1), **baseline)
    assert (plain.task_type, plain.modules_to_save) == (task, [head])


def test_a_head_alone_can_be_trained():
    model = symphonize(AutoModelForSequenceClassification.from_config(make_config("mixtral")))
    adapted = peft.get_peft_model(model, lora_config(model, attention=False))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained == ["base_model.model.score.modules_to_save.default.weight"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {"layers_to_transform": [0, 2]},
            {(layer, name) for layer in (0, 2) for name in ("gate_up_proj", "down_proj")},
        ),
        ({"layers_to_transform": 0}, {(0, "gate_up_proj"), (0, "down_proj")}),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, {(1, "gate_up_proj"), (1, "down_proj")}),
        ({"exclude_modules": r".*\.0\..*|.*gate_up_proj"}, {(1, "down_proj"), (2, "down_proj")}),
    ],
)
@pytest.mark.parametrize("named", [{"experts": True}, {"target_parameters": ["gate_up_proj", "down_proj"]}])
def test_lora_on_stacked_experts_of_some_layers(named, settings, wanted):
    """PEFT itself applies these settings to `target_modules` alone."""
    model = symphonize(make_model("olmoe"))
    adapted = peft.get_peft_model(model, lora_config(model, attention=False, **named, **settings))
    assert lora_names(adapted) == {f"model.layers.{layer}.mlp.experts.{name}" for layer, name in wanted}


def test_names_of_the_users_are_added():
    model = symphonize(make_model("olmoe"))
    config = lora_config(model, attention=False, target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    adapted = peft.get_peft_model(model, config)
    assert lora_names(adapted) == {"lm_head"}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert "base_model.model.model.embed_tokens.modules_to_save.default.weight" in trained


def test_routers_alone_can_be_trained():
    model = symphonize(make_model())
    adapted = peft.get_peft_model(model, lora_config(model, router="train", attention=False))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 3
    assert all(name.endswith("mlp.gate.modules_to_save.default.weight") for name in trained)


def test_a_learned_graph_is_trained_in_the_adapter():
    model = symphonize(make_model(), graph="learned")
    adapted = peft.get_peft_model(model, lora_config(model, attention=False))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 3
    assert all(name.endswith("symphony.modules_to_save.default.adjacency") for name in trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "trained"}, "did you mean `train`"),
        ({"rank": 4}, "no `rank`"),
        ({"lora_alpha": 4}, "called `alpha` here"),
        ({"lora_dropout": 0.1}, "called `dropout` here"),
        ({"target_modules": "all-linear"}, "list of names.*routers"),
        ({"target_modules": ["q_projj"]}, "did you mean `q_proj`"),
        ({"target_modules": ["mlp.gate"]}, "router='train'"),
        ({"modules_to_save": ["gate"]}, "router='train'"),
        ({"modules_to_save": ["symphony"]}, "router='train'"),
        ({"target_parameters": ["experts.w1"]}, "nothing is called 'experts.w1'"),
        ({"target_parameters": ["gate.weight"]}, "nothing is called|router='train'"),
        ({"experts": True, "dropout": 0.1}, "no input can be dropped"),
        ({"experts": True, "use_dora": True}, "cannot do `use_dora`"),
        ({"experts": True, "lora_bias": True}, "cannot do `lora_bias`"),
        ({"experts": True, "init_lora_weights": "pissa"}, "cannot start"),
        ({"attention": False}, "nothing would be trained"),
        ({"experts": True, "exclude_modules": ["experts"]}, r"exclude_modules=\['experts'\] leave none"),
        ({"target_parameters": ["down_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\] leave none"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"`layer_replication` is \[\[0, 2\], \[1, 3\]\].*leave it out"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        lora_config(symphonize(make_model("mixtral")), **settings)


@pytest.mark.parametrize("setting", ["dropout", "use_dora", "lora_bias", "init_lora_weights"])
def test_peft_itself_cannot_do_what_is_refused_on_stacked_experts(setting):
    """If a release of PEFT can do it, remove the refusal."""
    values = {"dropout": ("lora_dropout", 0.1), "init_lora_weights": ("init_lora_weights", "pissa")}
    name, value = values.get(setting, (setting, True))
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], **{name: value})
    with pytest.raises((ValueError, AttributeError)):
        peft.get_peft_model(make_model("mixtral"), config)


def test_names_that_peft_takes_for_experts():
    """Attention targets of such names are left out with a warning; a user's are refused.

    PEFT's own behaviour is shown first: if a release changes it, remove both.
    """
    config = peft.LoraConfig(r=2, target_modules=["shared_experts.gate_proj", "shared_experts.up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of ranks that it wrote for itself and does not find again
        found = lora_names(peft.get_peft_model(tiny_model("deepseek_v3"), config))
    assert found
    assert all(name.endswith("mlp.experts.gate_up_proj") for name in found)
    with pytest.raises(ConfigError, match="weights of the routed experts"):
        lora_config(symphonize(tiny_model("deepseek_v3")), target_modules=["shared_experts.up_proj"])
    lora_config(symphonize(make_model("qwen2_moe")), target_modules=["shared_expert.up_proj"])
    model = symphonize(tiny_model("afmoe"))
    with pytest.warns(SymphonyWarning, match=r"self_attn\.gate_proj get no LoRA"):
        config = lora_config(model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_experts_that_peft_cannot_be_told_of():
    with pytest.raises(UnsupportedModelError, match=r"dbrx.*\(192, 32\)"):
        lora_config(symphonize(tiny_model("dbrx")), experts=True)


def test_attention_that_is_not_found():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
            outputs = torch.stack([expert(x) for expert in self.experts], -2)
            index = chosen.unsqueeze(-1).expand(*chosen.shape, 8)
            return (weights.unsqueeze(-1) * outputs.gather(-2, index)).sum(-2)

    model = symphonize(nn.Sequential(Block(), Block()), routers="*.gate")
    with pytest.raises(UnsupportedModelError, match=r"attention=False.*target_modules"):
        lora_config(model)
    adapted = peft.get_peft_model(model, lora_config(model, attention=False, experts=True))
    assert len(lora_names(adapted)) == 8
    adapted(torch.randn(2, 8)).sum().backward()


def test_a_plain_model_is_refused():
    with pytest.raises(PatchError, match="symphonize"):
        lora_config(make_model())


def test_routers_and_graphs_cannot_be_mixed_in_one_model():
    adapted = adapted_model(router="train")
    with pytest.raises(ConfigError, match="adapter `default` has router='train'"):
        lora_config(adapted, router="graph")
    adapt(adapted, "other", router="train")


@pytest.mark.parametrize(
    ("wanted", "ends"),
    [
        (["a.0.q", "a.1.q"], ["q"]),
        (["a.0.mlp.gate", "a.1.mlp.gate"], ["mlp.gate"]),
        (["a.0.attn.o"], ["0.attn.o"]),  # the other layer has one, too
    ],
)
def test_ends_are_as_short_as_they_can_be(wanted, ends):
    names = ["a.0.q", "a.1.q", "a.0.mlp.gate", "a.1.mlp.gate", "a.0.shared.gate", "a.0.attn.o", "a.1.attn.o"]
    assert shortest_ends(wanted, names) == ends
    by_letters = shortest_ends(["x.gate"], ["x.gate", "x.shared_gate"], matches=str.endswith)
    assert by_letters == ["x.gate"]
