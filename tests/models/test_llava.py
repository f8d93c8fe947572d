"""LLaVA out of two checkpoints: both are in it, unchanged, and the projector is new."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import make_model as make_text_model
from models import move_graphs
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from symphony_hf import ConfigError, expert_graphs, symphonize, upcycle_modules
from symphony_hf.models.llava import build_llava, is_after_layers
from symphony_hf.recipe import DataSection, ModelSection, Recipe
from symphony_hf.training import processors
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


def vision_tower(kind, folder):
    """A CLIP, whose features begin with a class token, or a SigLIP, all of whose features are of patches."""
    if kind == "clip":
        tower, images = CLIPVisionModel(CLIPVisionConfig(**VISION)), CLIPImageProcessorPil
    else:
        tower, images = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)), SiglipImageProcessorPil
    size = {"height": 8, "width": 8}
    tower.save_pretrained(folder)
    return str(folder), images(size=size, crop_size=size)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_patch_becomes_a_token(kind, tmp_path, monkeypatch):
    make_text_model("mixtral").save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    folder, images = vision_tower(kind, tmp_path / kind)
    # Older versions of transformers need torchvision to find the class by the folder.
    monkeypatch.setattr(processors, "AutoImageProcessor", SimpleNamespace(from_pretrained=lambda _: images))
    section = ModelSection(path=str(tmp_path / "text"), vision=folder)
    processor = processors.load_processor(
        Recipe(model=section, data=DataSection(kind="llava", path="data.json", images="images"))
    )
    batch = processor(text="<image> w3 w4", images=Image.new("RGB", (8, 8)), return_tensors="pt")
    model = build_llava(section.path, section.vision, processor.image_token_id).eval()
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4
    features = model.get_image_features(batch["pixel_values"]).pooler_output[0]
    whole = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][0]
    assert torch.equal(features, model.model.multi_modal_projector(whole[-4:]))
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_a_symphony_language_model_is_refused_and_its_graphs_are_taken_by_path(tower, tmp_path):
    plain = make_text_model("olmoe")
    plain.save_pretrained(tmp_path / "plain")
    trained = move_graphs(symphonize(plain))
    trained.save_pretrained(tmp_path / "symphony")
    with pytest.raises(ConfigError, match=r"symphony` is a Symphony checkpoint.*fold it; or give its plain base, and"):
        build_llava(str(tmp_path / "symphony"), tower, IMAGE)
    model = symphonize(build_llava(str(tmp_path / "plain"), tower, IMAGE), graph=str(tmp_path / "symphony"))
    graphs = zip(expert_graphs(model).values(), expert_graphs(trained).values(), strict=True)
    assert all(torch.equal(own, its) for own, its in graphs)


def test_the_vocabulary_grows_for_the_image(text, tower):
    model = build_llava(text, tower, 32)
    assert model.get_input_embeddings().num_embeddings == 64
    assert model.config.text_config.vocab_size == 64


def test_a_text_model_is_no_vision_tower(text):
    with pytest.raises(ConfigError, match="has no vision tower"):
        build_llava(text, text, IMAGE)


@pytest.mark.parametrize("part", ["", "encoder.layers.1."])
def test_a_tower_that_lacks_weights_is_refused(part, text, tower):
    """All of them, and one layer's."""
    file = Path(tower) / "model.safetensors"
    tensors = {f"other.{n}" if n.startswith(part) else n: tensor for n, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"tower` lacks \d+ weights of CLIPVisionModel \("):
        build_llava(text, tower, IMAGE)


@torch.no_grad()
def test_a_tower_needs_no_pooler(text, tmp_path):
    """LLaVA reads features before it, and checkpoints of ViT for classification have none."""
    config = ViTConfig(**VISION)
    tower = ViTModel(config, add_pooling_layer=False).eval()
    tower.save_pretrained(tmp_path / "vit")
    model = build_llava(text, str(tmp_path / "vit"), IMAGE).eval()
    inputs = batch()
    features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert torch.equal(features, tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2])
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    "tower",
    [
        lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
        lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
        lambda: ViTModel(ViTConfig(**VISION)),
    ],
    ids=["clip", "siglip", "vit"],
)
def test_what_is_after_the_layers_gets_no_gradient(tower):
    tower = tower()
    features = tower(batch()["pixel_values"], output_hidden_states=True).hidden_states[-2]
    features.square().sum().backward()
    without = {name for name, parameter in tower.named_parameters() if parameter.grad is None}
    last_layer = {name for name in without if re.search(r"layers?\.1\.", name)}
    after = {name for name, _ in tower.named_parameters() if is_after_layers(name)}
    assert without - last_layer == after != set()


def test_a_plan_of_it_is_made_from_the_two_configs(text, tower):
    section = ModelSection(path=text, vision=tower)
    model = empty_model(Recipe(model=section, data=DataSection(kind="llava", path="data.json", images="images")))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert sizes == {name: p.shape for name, p in build_llava(text, tower, IMAGE).named_parameters()}
