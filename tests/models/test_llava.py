"""LLaVA out of two checkpoints: both are in it, unchanged, and the projector is new."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from symphony_hf import ConfigError, expert_graphs, symphonize, upcycle_modules
from symphony_hf.models.llava import build_llava
from symphony_hf.recipe import DataSection, ModelSection, Recipe
from symphony_hf.training.models import empty_model

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "hidden_size": 8, "image_size": 8, "patch_size": 4}
IMAGE = 30


@pytest.fixture
def text(tmp_path):
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**SIZES, vocab_size=32, pad_token_id=0)).save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


@pytest.fixture
def tower(tmp_path):
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower")


def batch():
    ids = torch.tensor([[IMAGE] * 4 + [1, 2, 3]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def test_both_are_in_it(text, tower):
    model = build_llava(text, tower, IMAGE).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(text).eval()(ids).logits)
    own = dict(model.model.vision_tower.named_parameters())
    for name, parameter in CLIPVisionModel.from_pretrained(tower).named_parameters():
        assert torch.equal(own[name], parameter), name
    assert model(**batch()).logits.shape == (1, 7, 32)


@torch.no_grad()
def test_the_projector_is_seeded(text, tower):
    first, again, other = (build_llava(text, tower, IMAGE, seed=seed).model.multi_modal_projector for seed in (0, 0, 1))
    assert torch.equal(first.linear_1.weight, again.linear_1.weight)
    assert not torch.equal(first.linear_1.weight, other.linear_1.weight)
    assert 0.015 < first.linear_1.weight.std() < 0.025  # N(0, 0.02), of 128 draws
    assert not first.linear_1.bias.any()


@torch.no_grad()
def test_it_is_upcycled_saved_and_loaded(text, tower, tmp_path):
    model = build_llava(text, tower, IMAGE)
    dense = model.eval()(**batch()).logits
    symphonize(upcycle_modules(model, ["*multi_modal_projector"], num_experts=4, top_k=2))
    # Its copies' weights sum to 1 but for rounding.
    torch.testing.assert_close(model(**batch()).logits, dense)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
    assert len(expert_graphs(loaded)) == 1
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    # To float32 rounding: tensors mapped from a file are aligned otherwise, and BLAS may add them up in another order.
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits)


def test_a_whole_clip_gives_its_half_that_sees(text, tmp_path):
    config = CLIPConfig(text_config={**SIZES, "vocab_size": 20}, vision_config=VISION, projection_dim=8)
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    model = build_llava(text, str(tmp_path / "clip"), IMAGE)
    for name, parameter in clip.vision_model.named_parameters():
        own = next(p for n, p in model.model.vision_tower.named_parameters() if n.endswith(name))
        assert torch.equal(own, parameter), name


def test_the_vocabulary_grows_for_the_image(text, tower):
    model = build_llava(text, tower, 32)
    assert model.get_input_embeddings().num_embeddings == 64
    assert model.config.text_config.vocab_size == 64


def test_a_text_model_is_no_vision_tower(text):
    with pytest.raises(ConfigError, match="has no vision tower"):
        build_llava(text, text, IMAGE)


def test_a_plan_of_it_is_made_from_the_two_configs(text, tower):
    section = ModelSection(path=text, vision=tower)
    model = empty_model(Recipe(model=section, data=DataSection(kind="llava", path="data.json", images="images")))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert sizes == {name: p.shape for name, p in build_llava(text, tower, IMAGE).named_parameters()}
