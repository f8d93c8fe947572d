"""Config of a model that a recipe builds, with the vocabulary of its tokenizer."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import ModelSection

IMAGE_TOKEN = "<image>"


class Vocabulary(NamedTuple):
    """Size and special tokens of a tokenizer, as far as a model's config has them.

    Attributes:
        size: Number of tokens.
        special: Ids of special tokens by their names in a config; None for a token that there is not.
        image: Id of the image token.
        is_exact: Whether there are exactly `size` tokens; otherwise, there may be fewer.
    """

    size: int
    special: Mapping[str, int | None]
    image: int | None = None
    is_exact: bool = True


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the vocabulary of a tokenizer."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return Vocabulary(len(tokenizer), {name: getattr(tokenizer, name) for name in names}, image)


def build_config(section: ModelSection, vocabulary: Vocabulary | None) -> PreTrainedConfig:
    """Return the config that a model section spells out, with a vocabulary where it spells out none.

    Raises:
        ConfigError: If transformers does not know the family, or its config refuses a value; or if the section spells
            out fewer tokens than the vocabulary has, or another special token.
    """
    fields = dict(section.config or {})
    if vocabulary is not None:
        of_text = {"vocab_size": vocabulary.size, **vocabulary.special}
        if "text_config" in fields:
            _check_vocabulary(fields["text_config"], vocabulary, "config.text_config")
            fields["text_config"] = {**of_text, **fields["text_config"]}
            fields["image_token_id"] = vocabulary.image
        else:
            _check_vocabulary(fields, vocabulary, "config")
            fields = {**of_text, **fields}
    model_type = fields.pop("model_type")
    with as_config_error("config"):
        return AutoConfig.for_model(model_type, **fields)


def _check_vocabulary(fields: Mapping[str, Any], vocabulary: Vocabulary, where: str) -> None:
    """Refuse a config with which the model would be given tokens that it does not have, or end a text by another.

    The token that begins a text may be another one: a model is given that of the tokenizer.
    """
    size = fields.get("vocab_size")
    if vocabulary.is_exact and isinstance(size, int) and size < vocabulary.size:
        raise ConfigError(
            f"model: {where}: `vocab_size: {size}` is too small for the tokenizer, which has {vocabulary.size:,} "
            "tokens: leave it out"
        )
    most, begin = size if isinstance(size, int) else vocabulary.size, fields.get("bos_token_id")
    if isinstance(begin, int) and begin >= most:
        raise ConfigError(
            f"model: {where}: `bos_token_id: {begin}` is beyond the vocabulary of {most:,} tokens: leave it out"
        )
    for name in ("eos_token_id", "pad_token_id"):
        given, of_tokenizer = fields.get(name), vocabulary.special[name]
        # A model may have several tokens that end a text, and one that the tokenizer does not have.
        if None not in (given, of_tokenizer) and of_tokenizer not in (given if isinstance(given, list) else [given]):
            raise ConfigError(f"model: {where}: `{name}: {given}`, but the tokenizer has {of_tokenizer}: leave it out")


@contextlib.contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Raise what transformers refuses as a ConfigError with the first line of its message, or that of its cause."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, ImportError, StrictDataclassError) as error:
        said = error.__cause__ or error if isinstance(error, StrictDataclassError) else error
        first, _, _ = str(said).strip().partition("\n")
        raise ConfigError(f"model: {what}: {first}") from error
