"""Models of recipes on the meta device are those that training loads: dtype, attention, LLaVA of two checkpoints."""

import pytest
import torch
from models import make_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from symphony_hf import ConfigError, symphonize
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import SymphonyWarning
from symphony_hf.recipe import DataSection, ModelSection, PeftSection, Recipe
from symphony_hf.training.model_config import build_config, vocabulary_of
from symphony_hf.training.models import add_adapters, empty_model, load_model
from symphony_hf.training.processors import load_processor

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


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"model_type": "olmoe", "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


@pytest.fixture
def named(tmp_path):
    """A folder with a tokenizer of 300 tokens."""
    train_tokenizer([Document("a", "the quick brown fox jumps over the lazy dog. " * 50)], 300).save_pretrained(
        tmp_path / "named"
    )
    return str(tmp_path / "named")


def test_a_built_model_is_planned_with_the_tokenizer_that_it_is_trained_with(named):
    recipe = Recipe(model=ModelSection(config=TINY, tokenizer=named))
    empty, loaded = empty_model(recipe), load_model(recipe, load_processor(recipe))
    assert empty.config.vocab_size == loaded.config.vocab_size < DataSection.vocab_size
    assert [getattr(empty.config, name) for name in SPECIAL] == [getattr(loaded.config, name) for name in SPECIAL]


def test_it_is_said_if_that_tokenizer_is_not_here():
    recipe = Recipe(model=ModelSection(config={**TINY, "vocab_size": 77}, tokenizer="nobody/nothing"))
    with pytest.warns(SymphonyWarning, match="`nobody/nothing` is not on this machine, so it is not checked how many"):
        assert empty_model(recipe).config.vocab_size == 77


def test_a_named_tokenizer_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"the tokenizer of `.*` could not be loaded"):
        empty_model(Recipe(model=ModelSection(config=TINY, tokenizer=str(tmp_path))))


@pytest.mark.parametrize(("kind", "ids"), [("bpe", [1, 0, 0]), ("words", [0, None, 0]), ("characters", [0, None, 0])])
def test_a_model_is_planned_with_the_special_tokens_of_the_tokenizer_to_be_trained(kind, ids):
    """Those of its family are beyond such a vocabulary."""
    model = empty_model(Recipe(model=ModelSection(config=TINY), data=DataSection(vocab_size=500, tokenizer=kind)))
    assert [getattr(model.config, name) for name in SPECIAL] == ids
    assert model.config.vocab_size == 500


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"vocab_size": 200}, r"config: `vocab_size: 200` is too small for the tokenizer, which has \d+ tokens"),
        ({"eos_token_id": 7}, "config: `eos_token_id: 7`, but the tokenizer has 0"),
        ({"pad_token_id": 399}, "config: `pad_token_id: 399`, but the tokenizer has 1"),
        ({"bos_token_id": 5000}, r"config: `bos_token_id: 5000` is beyond the vocabulary of \d+ tokens"),
        ({"bos_token_id": 512, "vocab_size": 512}, "config: `bos_token_id: 512` is beyond the vocabulary of 512 tok"),
    ],
)
def test_a_config_that_contradicts_the_tokenizer_is_refused(named, config, problem):
    """An id beyond the vocabulary would be an IndexError in the first forward."""
    for fields in ({**TINY, **config}, {"model_type": "llava", "text_config": {**TINY, **config}}):
        where = "config.text_config" if "text_config" in fields else "config"
        recipe = Recipe(model=ModelSection(config=fields, tokenizer=named))
        with pytest.raises(ConfigError, match=problem.replace("config:", f"{where}:")):
            build_config(recipe.model, vocabulary_of(load_processor(recipe)))
    with pytest.raises(ConfigError, match=problem):
        empty_model(Recipe(model=ModelSection(config={**TINY, **config}, tokenizer=named)))


def test_a_config_may_have_room_for_more_tokens_and_several_ends(named):
    recipe = Recipe(model=ModelSection(config={**TINY, "vocab_size": 512, "eos_token_id": [5, 0]}, tokenizer=named))
    config = build_config(recipe.model, vocabulary_of(load_processor(recipe)))
    assert (config.vocab_size, config.eos_token_id) == (512, [5, 0])


def test_a_config_may_have_another_token_that_begins_a_text(named):
    """A model is trained with the tokenizer's; its own is the one that generation begins with."""
    recipe = Recipe(model=ModelSection(config={**TINY, "vocab_size": 512, "bos_token_id": 511}, tokenizer=named))
    assert build_config(recipe.model, vocabulary_of(load_processor(recipe))).bos_token_id == 511
    assert empty_model(recipe).config.bos_token_id == 511
