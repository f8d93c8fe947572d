"""Tokenizer of a recipe's model, or its processor if there are images."""

from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from symphony_hf.data.corpus import corpus_of
from symphony_hf.data.embedded import embedded_corpus
from symphony_hf.data.streams import sample_stream
from symphony_hf.data.tokenizer import cached_tokenizer
from symphony_hf.errors import ConfigError
from symphony_hf.models.llava import vision_config_of
from symphony_hf.recipe import ModelSection, Recipe

from .models import IMAGE_TOKEN, build_config


def load_processor(recipe: Recipe) -> Any:
    """Load the tokenizer of a recipe's checkpoint, or its processor if there are images.

    For a model that is built, a tokenizer is trained on the recipe's text, or on the first documents of a stream, and
    cached.

    Raises:
        ConfigError: If the checkpoint's tokenizer could not be loaded.
    """
    if recipe.model.tokenizer is not None or recipe.model.path is not None:
        return _stored_processor(recipe)
    data = recipe.data
    is_text = data.kind == "text" and data.path is not None
    if is_text and data.streaming:
        corpus = sample_stream(data)
    elif is_text:
        corpus = corpus_of(data)
    else:
        corpus = embedded_corpus()
    tokenizer = cached_tokenizer(corpus, data.vocab_size, kind=data.tokenizer)
    return tokenizer if recipe.data.kind != "llava" else _build_processor(recipe.model, tokenizer)


def _stored_processor(recipe: Recipe) -> Any:
    source, revision = recipe.model.tokenizer or recipe.model.path, recipe.model.revision
    try:
        if recipe.model.vision is not None:
            return _processor_of_both(recipe.model, AutoTokenizer.from_pretrained(source, revision=revision))
        loader = AutoProcessor if recipe.data.kind == "llava" else AutoTokenizer
        return loader.from_pretrained(source, revision=revision if recipe.model.tokenizer is None else None)
    except (OSError, ValueError) as error:
        name = "path" if recipe.model.tokenizer is None else "tokenizer"
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model: {name}: the tokenizer of `{source}` could not be loaded: {first}") from error


def _processor_of_both(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Build the processor of a LLaVA made of two checkpoints, with the vision tower's image processor."""
    assert section.vision is not None
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(section.vision),
        tokenizer=tokenizer,
        patch_size=vision_config_of(section.vision).patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token
    )


def _build_processor(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Build the processor of a LLaVA with random weights: images of its vision tower's size, and an image token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    vision = build_config(section, tokenizer).vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token
    )
