"""Tokenizer of a recipe's model, or its processor if there are images."""

from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from symphony_hf.data.corpus import corpus_of
from symphony_hf.data.embedded import embedded_corpus
from symphony_hf.data.streams import sample_stream
from symphony_hf.data.tokenizer import cached_tokenizer, has_vocabulary
from symphony_hf.errors import ConfigError
from symphony_hf.models.llava import has_class_token, select_strategy, vision_config_of
from symphony_hf.recipe import Recipe

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
    if data.kind != "llava":
        return tokenizer
    config = build_config(recipe.model, None)
    vision, strategy = config.vision_config, getattr(config, "vision_feature_select_strategy", "default")
    size = {"height": vision.image_size, "width": vision.image_size}
    return _processor(tokenizer, vision, strategy, CLIPImageProcessorPil(size=size, crop_size=size))


def _stored_processor(recipe: Recipe) -> Any:
    source = recipe.model.tokenizer or recipe.model.path
    revision = recipe.model.revision if recipe.model.tokenizer is None else None
    try:
        if recipe.model.vision is not None:
            tokenizer = _not_empty(AutoTokenizer.from_pretrained(source, revision=revision))
            images = AutoImageProcessor.from_pretrained(recipe.model.vision)
            vision = vision_config_of(recipe.model.vision)
            return _processor(tokenizer, vision, select_strategy(vision), images)
        loader = AutoProcessor if recipe.data.kind == "llava" else AutoTokenizer
        return _not_empty(loader.from_pretrained(source, revision=revision))
    except (OSError, ValueError) as error:
        name = "path" if recipe.model.tokenizer is None else "tokenizer"
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model: {name}: the tokenizer of `{source}` could not be loaded: {first}") from error


def _not_empty(processor: Any) -> Any:
    """Refuse the empty tokenizer that transformers builds for a checkpoint without the files of one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and not has_vocabulary(tokenizer):
        raise ValueError("its files are missing; set `model.tokenizer` to a checkpoint that has them")
    return processor


def _processor(
    tokenizer: PreTrainedTokenizerBase, vision: PreTrainedConfig, strategy: str, images: Any
) -> LlavaProcessor:
    """Build the processor of a LLaVA, and give the tokenizer its image token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(has_class_token(vision)),
    )
