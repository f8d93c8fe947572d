"""From a recipe's data section to data to train on."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_hf.data.images.llava import prepare_llava
from symphony_hf.errors import ConfigError, DataError

from .chat import prepare_chat
from .datasets import progress_bars
from .glue import EMBEDDED, prepare_glue
from .prepared import PreparedData
from .text import prepare_text

if TYPE_CHECKING:
    from symphony_hf.recipe import DataSection

_STREAMED = ("text",)
_PACKED = ("text", "chat")


def prepare_data(
    section: "DataSection",
    processor: Any,
    *,
    seed: int,
    train: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PreparedData:
    """Read, check and tokenize the data of a recipe. Every error in the data is raised here.

    Tokens and checks are kept in the cache of `datasets`. Under a launcher, let one process go first.

    Args:
        section: Data section of a recipe.
        processor: The model's tokenizer, or its LlavaProcessor for kind `llava`. A tokenizer without a padding token or
            a chat template is given one if the kind needs it; the notes then say so.
        seed: Seed of the order of streams and of embedded conversations. Held-out data does not depend on it.
        train: Train section of the recipe, whose settings must have an effect on the data; empty when None.
        progress: Whether to show progress in a terminal.

    Returns:
        The splits, their collator, and notes for the report.

    Raises:
        DataError: If the data is missing, unreadable, empty, or not in the form that the kind needs.
        ConfigError: If a setting contradicts another one, has no effect, or does not fit the processor.
    """
    _check_settings(section, processor)
    with progress_bars(progress):
        if section.kind == "text":
            return prepare_text(section, processor, seed, train or {})
        if section.kind == "chat":
            return prepare_chat(section, processor, seed, train or {})
        if section.kind == "glue":
            return prepare_glue(section, processor)
        return prepare_llava(section, processor)


def _check_settings(section: "DataSection", processor: Any) -> None:
    """Refuse settings that would have no effect."""
    kind, path = section.kind, section.path
    if section.streaming and kind not in _STREAMED:
        raise DataError(f"data: streaming: only text can be streamed, not {kind}: leave `streaming` out")
    if section.packing and kind not in _PACKED:
        raise ConfigError(f"data: packing: only text and chat can be packed, not {kind}: leave `packing` out")
    if section.images is not None and kind != "llava":
        raise ConfigError(f"data: images: only `kind: llava` has images, not {kind}")
    if section.images is not None and path is None:
        raise ConfigError("data: images: without `path`, the images are scikit-learn's digits: leave `images` out")
    if section.text_column != "text" and path is None:
        raise ConfigError(
            f"data: text_column: without `path`, there is no column `{section.text_column}`: leave `text_column` out"
        )
    local = None if path is None else Path(path).expanduser()
    is_stand_in = kind == "glue" and path == EMBEDDED
    is_local = kind == "llava" or is_stand_in or (local is not None and local.exists())
    names = ("revision",) if kind == "glue" else ("revision", "name")
    given = [name for name in names if getattr(section, name) is not None]
    if given and (is_local or (path is None and kind != "glue")):
        raise ConfigError(
            f"data: `{given[0]}` is a setting of data sets on the Hub, and this one is not from there: leave it out"
        )
    has_images = hasattr(processor, "image_processor")
    if (kind == "llava") != has_images:
        needed = "a LlavaProcessor" if kind == "llava" else "a tokenizer"
        raise ConfigError(f"data: `kind: {kind}` needs {needed}, got {type(processor).__name__}")
