"""Models of recipes on the meta device are those that training loads: dtype, attention, LLaVA of two checkpoints."""

import pytest
import torch
from models import make_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from symphony_hf import ConfigError, symphonize
from symphony_hf.recipe import DataSection, ModelSection, PeftSection, Recipe
from symphony_hf.training.models import add_adapters, build_config, empty_model, load_model

IMAGES = DataSection(kind="llava")


class OneToken:
    """A tokenizer as far as it is asked."""

    def convert_tokens_to_ids(self, token):
        return 5


@pytest.fixture
def text(tmp_path):
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "text")
    return str(tmp_path / "text"), {"model_type": "olmoe", **model.config.to_diff_dict()}


@pytest.fixture
def tower(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower")


def without_dtype(config):
    return {name: value for name, value in config.items() if name not in ("dtype", "architectures")}


def test_a_described_checkpoint_has_its_own_dtype(text):
    path, config = text
    model = empty_model(Recipe(model=ModelSection(path=path, config=without_dtype(config))))
    assert model.dtype == torch.bfloat16
    missing = Recipe(model=ModelSection(path="nowhere", config=without_dtype(config)))
    with pytest.raises(ConfigError, match=r"`nowhere` could not be loaded.*set `model.dtype`"):
        empty_model(missing)


@pytest.mark.parametrize("described", [False, True])
def test_a_text_checkpoint_with_a_vision_tower(text, tower, described):
    path, config = text
    config = without_dtype(config) if described else None
    section = ModelSection(path=path, config=config, vision=tower, attention="eager", experts="batched_mm")
    recipe = Recipe(model=section, symphony=None, data=IMAGES)
    loaded, empty = load_model(recipe, OneToken()), empty_model(recipe)
    assert empty.device.type == "meta"
    for model in (loaded, empty):
        assert model.dtype == torch.bfloat16
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {"eager"}
        assert model.config.text_config._experts_implementation == "batched_mm"
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (loaded, empty)]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_together_is_refused(text, tower):
    with pytest.raises(ConfigError, match="`quantization` is not supported with `vision`"):
        ModelSection(path=text[0], vision=tower, quantization="nf4")


def test_a_config_of_wrong_types_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="hidden_size"):
        build_config(ModelSection(config={"model_type": "olmoe", "hidden_size": "64"}), None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"attention": "foo"}, "attn_implementation"), ({"experts": "foo"}, "experts_implementation")],
)
def test_unknown_implementations_are_refused(text, settings, problem):
    with pytest.raises(ConfigError, match=f"could not be built: .*{problem}"):
        empty_model(Recipe(model=ModelSection(path=text[0], **settings)))


def test_flash_attention_has_the_size_of_the_fused_kernel_that_is_always_there(text):
    model = empty_model(Recipe(model=ModelSection(path=text[0], attention="flash_attention_2")))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("router", ["graph", "train"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_adapters_of_a_stock_model_are_those_of_its_baseline(family, router, experts):
    """The same weights are trained as with a graph."""
    section = PeftSection(router=router, experts=experts, r=4)
    stock, own = add_adapters(make_model(family), section), add_adapters(symphonize(make_model(family)), section)
    trained, expected = (
        {name: p.shape for name, p in model.named_parameters() if p.requires_grad} for model in (stock, own)
    )
    assert trained == expected
    assert any("gate" in name and "lora" not in name for name in trained) == (router == "train")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        add_adapters(make_model(family), PeftSection(attention=False))
