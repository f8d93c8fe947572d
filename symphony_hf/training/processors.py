"""Tokenizer of a recipe's model, or its processor if there are images."""

import warnings
from pathlib import Path
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

from symphony_hf.data.tokenizer import cached_tokenizer, has_vocabulary, special_ids
from symphony_hf.data.tokenizer_text import tokenizer_corpus
from symphony_hf.errors import ConfigError, SymphonyWarning
from symphony_hf.models.llava import has_class_token, select_strategy, vision_config_of
from symphony_hf.recipe import Recipe
from symphony_hf.settings import changed_settings

from .model_config import IMAGE_TOKEN, Vocabulary, build_config, vocabulary_of


def load_processor(recipe: Recipe) -> Any:
    """Load the tokenizer of a recipe's checkpoint, or its processor if there are images.

    For a model that is built without `model.tokenizer`, a tokenizer is trained on the text that the model will read, or
    on the first documents of a stream, and cached. For data that needs no download, it is trained on the source of the
    running Python's library.

    Raises:
        ConfigError: If the checkpoint's tokenizer could not be loaded.
        DataError: If the data could not be read.
    """
    if not recipe.trains_tokenizer:
        return _stored_processor(recipe)
    data = recipe.data
    tokenizer = cached_tokenizer(tokenizer_corpus(data), data.vocab_size, kind=data.tokenizer)
    if data.kind != "llava":
        return tokenizer
    config = build_config(recipe.model, None)
    vision, strategy = config.vision_config, getattr(config, "vision_feature_select_strategy", "default")
    size = {"height": vision.image_size, "width": vision.image_size}
    return _processor(tokenizer, vision, strategy, CLIPImageProcessorPil(size=size, crop_size=size))


def tokenizer_notes(recipe: Recipe) -> list[str]:
    """Return notes on settings of a trained tokenizer that have no effect, because another one is used."""
    given: dict[str, Any] = {} if recipe.trains_tokenizer else changed_settings(recipe.data)
    return [
        f"data: `{name}: {given[name]}` has no effect: the tokenizer is that of `model.{tokenizer_source(recipe)}`"
        for name in ("vocab_size", "tokenizer")
        if name in given
    ]


def tokenizer_source(recipe: Recipe) -> str:
    """Return the setting of the model that names a tokenizer which is not trained: `tokenizer` or `path`."""
    return "path" if recipe.model.tokenizer is None else "tokenizer"


def expected_vocabulary(recipe: Recipe) -> Vocabulary | None:
    """Return the vocabulary that a model is built with, without reading data or downloading anything.

    Returns:
        That of `model.tokenizer`; of a tokenizer that is yet to be trained, its kind's, of `data.vocab_size` tokens at
        most. None if `model.tokenizer` is not on this machine.

    Raises:
        ConfigError: If `model.tokenizer` is a local folder that could not be loaded.

    Warns:
        SymphonyWarning: If `model.tokenizer` is not on this machine.
    """
    if recipe.trains_tokenizer:
        size, image = recipe.data.vocab_size, None
        if recipe.data.kind == "llava":
            size, image = size + 1, size
        return Vocabulary(size, special_ids(recipe.data.tokenizer), image, is_exact=False)
    try:
        processor = _stored_processor(recipe, local_files_only=True)
    except ConfigError as error:
        if Path(str(recipe.model.tokenizer)).exists():
            raise
        warnings.warn(
            f"model: `{recipe.model.tokenizer}` is not on this machine, so it is not checked how many tokens the model "
            f"is built for ({error})",
            SymphonyWarning,
            stacklevel=3,
        )
        return None
    return vocabulary_of(getattr(processor, "tokenizer", processor))


def _stored_processor(recipe: Recipe, **settings: Any) -> Any:
    source = recipe.model.tokenizer or recipe.model.path
    revision = recipe.model.revision if recipe.model.tokenizer is None else None
    try:
        if recipe.model.vision is not None:
            tokenizer = _not_empty(AutoTokenizer.from_pretrained(source, revision=revision))
            images = AutoImageProcessor.from_pretrained(recipe.model.vision)
            vision = vision_config_of(recipe.model.vision)
            return _processor(tokenizer, vision, select_strategy(vision), images)
        loader = AutoProcessor if recipe.data.kind == "llava" else AutoTokenizer
        return _not_empty(loader.from_pretrained(source, revision=revision, **settings))
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model: {tokenizer_source(recipe)}: the tokenizer of `{source}` could not be loaded: {first}"
        ) from error


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
