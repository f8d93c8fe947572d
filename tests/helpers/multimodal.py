"""Tiny models that take images: LLaVA's three wrappers around a Mixture-of-Experts text model, and families whole."""

import copy
from functools import cache

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    SiglipVisionConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput

from symphony_hf.experiments.conformance.batches import tiny_images
from symphony_hf.experiments.conformance.tiny import tiny_config, tiny_model

TEXTS = ["mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
IMAGE_TOKEN = 127  # the last of the tiny vocabulary
NO_LABEL = -100
SIDE, PATCH = 8, 4  # of what the vision tower sees, in pixels; 2 x 2 patches
ROW_LENGTH = 40
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
# Height and width of each row's image. The first fills its grid, of 1 x 2 tiles; the second is cut out of 2 x 2.
IMAGE_SIZES = [[8, 16], [16, 10]]
TILES = [1 + 2, 1 + 4]  # of each row's image, with the one that shows it whole

WRAPPERS = {
    "llava": (LlavaConfig, CLIPVisionConfig, {}),
    "llava_next": (LlavaNextConfig, CLIPVisionConfig, {"image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": (
        LlavaOnevisionConfig,
        SiglipVisionConfig,
        {"image_grid_pinpoints": PINPOINTS, "video_token_index": IMAGE_TOKEN - 1},
    ),
}


@cache
def _pristine(case):
    wrapper, _, text = case.partition("+")
    if not text:
        return tiny_model(case)
    config_class, vision_class, settings = WRAPPERS[wrapper]
    vision_settings = VISION | ({"vision_use_head": False} if vision_class is SiglipVisionConfig else {})
    config = config_class(
        vision_config=vision_class(**vision_settings),
        text_config=tiny_config(text),
        image_token_index=IMAGE_TOKEN,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        with torch.no_grad():
            for router in routers_by_name(model).values():
                # Far from ties, so that one rounding does not change who is chosen.
                router.weight.normal_(std=2.0 * router.weight.shape[1] ** -0.5)
    return model


def stock_model(case):
    """A fresh plain model, in eval mode: of a family, `qwen3_vl_moe`, or of a wrapper and its text, `llava+olmoe`."""
    return copy.deepcopy(_pristine(case))  # of one that never ran, and carries no hooks


@cache
def _batch(case):
    model = stock_model(case)
    return _llava_batch(model) if "+" in case else tiny_images(model)


def image_batch(case, *, padded=False):
    """Two rows of text, labels and an image each. Padded: the last three tokens of the second row are none."""
    batch = {name: tensor.clone() for name, tensor in _batch(case).items()}
    if padded:
        batch["attention_mask"][1, -3:] = 0
        batch["input_ids"][1, -3:] = 0
        batch["labels"][1, -3:] = NO_LABEL
    return batch


def other_image(batch):
    """The same batch with other pixels."""
    return batch | {"pixel_values": batch["pixel_values"].flip(-1)}


def for_generation(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _llava_batch(model):
    generator = torch.Generator().manual_seed(0)
    pixels = _llava_pixels(model, generator)
    rows = []
    for num_image_tokens in _image_lengths(model, pixels):
        text = torch.randint(3, IMAGE_TOKEN - 1, (ROW_LENGTH - num_image_tokens,), generator=generator)
        rows.append(torch.cat([text[:2], torch.full((num_image_tokens,), IMAGE_TOKEN), text[2:]]))
    ids = torch.stack(rows)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, NO_LABEL)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **pixels}


def _llava_pixels(model, generator):
    if model.config.model_type == "llava":
        return {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=generator)}
    tiles = torch.randn(2, max(TILES), 3, SIDE, SIDE, generator=generator)
    for row, num_tiles in enumerate(TILES):
        tiles[row, num_tiles:] = 0.0  # as the image processor pads
    return {"pixel_values": tiles, "image_sizes": torch.tensor(IMAGE_SIZES)}


@torch.no_grad()
def _image_lengths(model, pixels):
    """How many tokens the model makes of each row's image."""
    config = model.config
    features = model.get_image_features(
        **pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    if isinstance(features, ModelOutput):
        features = features.pooler_output
    return [len(feature) for feature in features]


def auto_class(case):
    """The class of transformers that loads the family, images and all."""
    family = case.partition("+")[0]
    known = family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if known else AutoModelForMultimodalLM


# What a router is, told without symphony_hf.


def routers_by_name(model):
    """The routers of a plain model: what is called `gate` or `router` and has a weight of a row an expert."""
    found = {}
    for name, module in model.named_modules():
        is_router = name.rpartition(".")[2] in ("gate", "router") and any(p.dim() == 2 for p in module.parameters())
        if is_router and not isinstance(module, nn.Sequential):
            found[name] = module
    return found


def weight_name(router):
    """Of the parameter that makes the logits."""
    return next(name for name, p in router.named_parameters() if p.dim() == 2 and name.endswith("weight"))


def logits_of(router, output):
    """The raw logits in what a plain router returned. Llama 4 returns dense scores before them."""
    if isinstance(output, torch.Tensor):
        return output
    return output[1 if type(router).__name__ == "Llama4Router" else 0]


class Recorder:
    """What each router of a model computed in the last forward, and what its experts were told.

    Attributes:
        inputs: Router's name -> (args, kwargs) of its call, copied.
        outputs: Router's name -> its output.
        logits: Router's name -> its raw logits, with gradient.
        chosen: Router's name -> the chosen experts, as the experts got them. Shape: (tokens, top_k).
    """

    def __init__(self, model, names):
        self.inputs, self.outputs, self.logits, self.chosen = {}, {}, {}, {}
        self.top_k = 1 if "llama4" in model.config.model_type else 2
        modules = dict(model.named_modules())
        for name in names:
            router = modules[name]
            router.register_forward_pre_hook(self._take_inputs(name), with_kwargs=True)
            router.register_forward_hook(self._take_output(name))
            inner = next((part for part in router.children() if isinstance(part, nn.Linear)), None)
            if inner is not None:  # Gemma 4 returns probabilities
                inner.register_forward_hook(self._take_inner_logits(name))
            experts = modules.get(name.rpartition(".")[0] + ".experts")
            if experts is not None:
                experts.register_forward_pre_hook(self._take_chosen(name), with_kwargs=True)

    def _take_inputs(self, name):
        def hook(module, args, kwargs):
            self.inputs[name] = copy.deepcopy(tuple(a.detach() if torch.is_tensor(a) else a for a in args)), kwargs

        return hook

    def _take_output(self, name):
        def hook(module, args, output):
            self.outputs[name] = output
            if not any(isinstance(part, nn.Linear) for part in module.children()):
                self.logits[name] = logits_of(module, output)

        return hook

    def _take_inner_logits(self, name):
        def hook(module, args, output):
            self.logits[name] = output

        return hook

    def _take_chosen(self, name):
        def hook(module, args, kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            indices = [value for value in tensors if not value.is_floating_point() and value.dim() == 2]
            if indices:
                self.chosen[name] = indices[0].detach().clone()

        return hook

    def chosen_by(self, name):
        """Where the experts got no numbers (Llama 4's, and Aria's before transformers 5.21), the highest logits."""
        return self.chosen[name] if name in self.chosen else self.logits[name].topk(self.top_k).indices
