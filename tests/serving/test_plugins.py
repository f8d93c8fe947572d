"""The plugins against stand-ins for the engines' registries: what is registered, chosen and refused."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from clients import read_config_as
from models import make_model, move_graphs
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from symphony_hf import FoldError, PatchError, export_folded, symphonize
from symphony_hf.checkpoints import marks
from symphony_hf.serving import plugins
from symphony_hf.serving.router_names import ROUTERS


class Olmoe(nn.Module):
    """An engine's model class, which keeps what it loads."""

    def __init__(self, *, vllm_config=None, config=None, prefix=""):
        super().__init__()

    def load_weights(self, weights):
        self.loaded = dict(weights)
        return set(self.loaded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = move_graphs(symphonize(make_model()))
    model.save_pretrained(folder / "symphony")
    export_folded(model, folder / "folded", tokenizer=False)
    return folder


def assert_loads_folded(model, folder):
    expected = load_file(folder / "folded" / "model.safetensors")
    assert model.load_weights(load_file(folder / "symphony" / "model.safetensors").items()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.loaded.items())


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's registry, with one of our families and one other."""
    registered = {}
    registry = SimpleNamespace(
        models={
            "OlmoeForCausalLM": SimpleNamespace(load_model_cls=lambda: Olmoe),
            "LlamaForCausalLM": SimpleNamespace(load_model_cls=lambda: nn.Linear),
        },
        get_supported_archs=lambda: registry.models.keys(),
        register_model=registered.__setitem__,
        registered=registered,
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    return registry


def test_vllm_is_offered_the_families_that_it_has(vllm, folder):
    plugins.register_vllm()
    assert vllm.registered == {
        "SymphonyOlmoeForCausalLM": "symphony_hf.serving.plugins:SymphonyOlmoeForCausalLM",
    }
    assert set(ROUTERS) > {"OlmoeForCausalLM"}
    config = read_config_as("vllm", folder / "symphony")
    assert config.architectures == ["SymphonyOlmoeForCausalLM"]
    model_class = plugins.SymphonyOlmoeForCausalLM
    assert issubclass(model_class, Olmoe)
    assert model_class is plugins.SymphonyOlmoeForCausalLM
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    assert_loads_folded(model_class(vllm_config=vllm_config, prefix="model"), folder)


@pytest.mark.parametrize("name", ["OlmoeForCausalLM", "SymphonyLlamaForCausalLM", "SymphonyNonsense"])
def test_other_names_are_no_attributes(vllm, name):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(plugins, name)


def test_scores_are_refused_before_the_model_is_built(vllm):
    config = PreTrainedConfig(symphony={"smoothing": "scores"})
    with pytest.raises(FoldError, match="smooths scores"):
        plugins.SymphonyOlmoeForCausalLM(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))


def test_a_model_class_that_loads_in_another_way_is_refused():
    with pytest.raises(PatchError, match="Linear has no `load_weights`"):
        plugins.folding_class(nn.Linear, "Linear", "OlmoeForCausalLM", lambda config: config)


@pytest.fixture
def sglang(monkeypatch):
    """SGLang's choice of a model class, and its registry of hooks, which applies them on request."""
    utils, hooks = ModuleType("sglang.srt.model_loader.utils"), ModuleType("sglang.srt.plugins.hook_registry")
    utils.get_model_architecture = lambda model_config: (Olmoe, model_config.hf_config.architectures[0])
    asked = []

    def apply():
        ((target, hook, kind),) = asked
        assert (target, kind) == ("sglang.srt.model_loader.utils.get_model_architecture", "around")
        original = utils.get_model_architecture
        utils.get_model_architecture = lambda *args, **kwargs: hook(original, *args, **kwargs)

    hooks.HookRegistry = SimpleNamespace(register=lambda *wanted: asked.append(wanted))
    hooks.HookType = SimpleNamespace(AROUND="around")
    loader = SimpleNamespace(utils=utils)
    for name, module in {"sglang": ModuleType("sglang"), "sglang.srt": ModuleType("sglang.srt")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "sglang.srt.model_loader", loader)
    monkeypatch.setitem(sys.modules, "sglang.srt.model_loader.utils", utils)
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins", ModuleType("sglang.srt.plugins"))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
    monkeypatch.setattr(marks, "CHOOSES_BY_MARK", dict(marks.CHOOSES_BY_MARK))
    monkeypatch.setattr(plugins, "CHOOSES_BY_MARK", marks.CHOOSES_BY_MARK)
    plugins.register_sglang()
    return SimpleNamespace(utils=utils, apply=apply)


def test_sglang_sees_the_familys_name_and_gets_our_class(sglang, folder):
    sglang.apply()
    config = read_config_as("sglang", folder / "symphony")
    assert config.architectures == ["OlmoeForCausalLM"]
    model_class, architecture = sglang.utils.get_model_architecture(SimpleNamespace(hf_config=config))
    assert architecture == "OlmoeForCausalLM"
    assert issubclass(model_class, Olmoe)
    assert model_class.__name__ == "Olmoe"
    assert_loads_folded(model_class(config=config), folder)


def test_sglangs_own_classes_load_plain_checkpoints(sglang, folder):
    sglang.apply()
    plain = SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder / "folded"))
    assert sglang.utils.get_model_architecture(plain) == (Olmoe, "OlmoeForCausalLM")


def test_a_hook_that_sglang_could_not_apply_leaves_the_mark(sglang, folder):
    assert read_config_as("sglang", folder / "symphony").architectures == ["SymphonyOlmoeForCausalLM"]


def test_another_family_is_refused_in_sglang(sglang):
    sglang.apply()
    config = PreTrainedConfig(architectures=["DbrxForCausalLM"], symphony={})
    model_class, _ = sglang.utils.get_model_architecture(SimpleNamespace(hf_config=config))
    with pytest.raises(FoldError, match=r"DbrxForCausalLM: symphony_hf serves unfolded checkpoints of .*Mixtral"):
        model_class(config=config)
