"""A model under test: its fingerprint, and its weights, loaded on first use."""

import functools
import gc
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from symphony_hf.checkpoints.model_class import read_config
from symphony_hf.data.tokenizer import has_vocabulary
from symphony_hf.errors import ConfigError
from symphony_hf.models.llava import is_after_layers

_DECIDING = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
"""Suffixes of the files that decide what a model computes: weights, settings, chat templates and vocabularies."""

_HINT = "name a folder or model that has it: --tokenizer"

_LARGE = 1 << 20
"""Size in bytes above which a file is identified by its size and modification time instead of its contents."""


class ModelUnderTest:
    """A checkpoint whose weights are loaded on first use.

    Args:
        source: A folder, or a name on the Hub.
        revision: Revision on the Hub.
        dtype: Dtype of the weights; `auto` keeps the stored one.
        auto_class: Auto class of transformers that loads the model.

    Attributes:
        config: Config of the model.
        fingerprint: Identifier of the checkpoint's contents; see `fingerprint_of`.
        on_load: Called with every model that is loaded, for those who measure evaluations; None for nobody.

    Raises:
        ConfigError: If transformers does not know the model, or it is an adapter.
    """

    on_load: ClassVar[Callable[[PreTrainedModel], object] | None] = None

    def __init__(self, source: str, revision: str | None, dtype: str, auto_class: Any = AutoModelForCausalLM) -> None:
        self.source, self.revision, self.dtype, self.auto_class = source, revision, dtype, auto_class
        self.config: PreTrainedConfig = read_config(source, revision)
        self.fingerprint = fingerprint_of(source, revision)

    @property
    def max_tokens(self) -> int | None:
        """Context length of the model; None if its config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_vocabulary(self, highest: int) -> None:
        """Check that the model has an embedding for every token of its inputs.

        Args:
            highest: Highest token id of the inputs.

        Raises:
            ConfigError: If it is not in the model's vocabulary.
        """
        size = self.config.get_text_config().vocab_size
        if highest >= size:
            raise ConfigError(
                f"`{self.source}`: the tokenizer gives token id {highest}, and the model's vocabulary has {size} "
                "tokens: the tokenizer is another model's, so give the model's own with --tokenizer"
            )

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, on the accelerator if there is one.

        Raises:
            ConfigError: If its weights could not be loaded, or some are missing, which transformers would leave random.
        """
        device_map = "auto" if torch.accelerator.is_available() else None
        try:
            model, info = self.auto_class.from_pretrained(
                self.source,
                revision=self.revision,
                dtype=self.dtype,
                device_map=device_map,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"`{self.source}`: the model could not be loaded: {error}") from error
        unused = (name for name in info["missing_keys"] if is_after_layers(name.partition("vision_tower.")[2]))
        missing = sorted(set(info["missing_keys"]).difference(unused))
        if missing:
            raise ConfigError(
                f"`{self.source}`: it lacks {len(missing)} weights of {type(model).__name__} ({missing[0]}, ...), and "
                "random ones would take their place: give a checkpoint that has them"
            )
        if ModelUnderTest.on_load is not None:
            ModelUnderTest.on_load(model)
        return model.eval()

    def release(self) -> None:
        """Free the weights for the next model."""
        self.__dict__.pop("model", None)
        gc.collect()  # a symphonized model refers to itself


def load_tokenizer(source: str, revision: str | None) -> Any:
    """Load a checkpoint's tokenizer. Raises ConfigError if it has none."""
    tokenizer = _load(AutoTokenizer, "tokenizer", source, revision)
    if not has_vocabulary(tokenizer):
        raise ConfigError(f"`{source}`: no tokenizer (its files are missing); {_HINT}")
    return tokenizer


def load_processor(source: str, revision: str | None) -> Any:
    """Load a vision-language checkpoint's processor. Raises ConfigError if it has none, or one that takes no images."""
    processor = _load(AutoProcessor, "processor", source, revision)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ConfigError(f"`{source}`: {type(processor).__name__} is no processor of images and text; {_HINT}")
    return processor


def _load(auto_class: Any, what: str, source: str, revision: str | None) -> Any:
    try:
        return auto_class.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"`{source}`: no {what} ({first}); {_HINT}") from error


def fingerprint_of(source: str, revision: str | None) -> str:
    """Return an identifier of a checkpoint's contents: its commit on the Hub, or a digest of its files."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        # The Hub's cache keeps each commit in a folder named after it.
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent.name
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _DECIDING:
            stat = path.stat()
            contents = f"{stat.st_size} {stat.st_mtime_ns}".encode() if stat.st_size > _LARGE else path.read_bytes()
            digest.update(hashlib.sha256(path.name.encode() + b"\0" + contents).digest())
    return digest.hexdigest()
