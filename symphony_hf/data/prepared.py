"""Prepared data of a recipe: splits for a Trainer, and notes for the report."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from symphony_hf.compat import __version__
from symphony_hf.errors import DataError

from .documents import Document

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from symphony_hf.recipe import DataKind, DataSection


@dataclass(frozen=True)
class PreparedData:
    """Data that has been read and checked.

    Attributes:
        kind: Kind of the data section.
        train: Training examples for a Trainer; rows for TRL's SFTTrainer if `kind` is `chat`.
        validation: Validation examples, or None if the source has none, or less text than a block.
        test: Test examples, or None if the source has none, or less text than a block.
        collator: Data collator; the Trainer's own when None.
        documents: Whole documents of the test split if `kind` is `text`, for statistics per document; otherwise None.
        revision: Commit of a data set on the Hub, or SHA-256 of local data; None if neither is known.
        num_tokens: Number of tokens of the train split without padding; None if it is not known before training.
        notes: Notes for readers of the results, such as rows that were left out.
    """

    kind: "DataKind"
    train: Any
    validation: Any = None
    test: Any = None
    collator: Callable[[list[Any]], dict[str, Any]] | None = None
    documents: list[Document] | None = None
    revision: str | None = None
    num_tokens: int | None = None
    notes: list[str] = field(default_factory=list)


_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "imagecorruptions": "imagecorruptions-imaug"}
"""Modules whose names differ from their packages -> the package."""


def require(module: str, purpose: str, extra: str = "vision") -> None:
    """Check that a module is installed. If not, the DataError has the command that installs the extra.

    `purpose` is what needs it, in the plural.
    """
    if importlib.util.find_spec(module) is None:
        package = _PACKAGES.get(module, module)
        raise DataError(f"{purpose} need {package}, which is not installed: pip install 'symphony-hf[{extra}]'")


def check_lengths(section: "DataSection", config: "PretrainedConfig") -> None:
    """Check that the model has positions for the longest sequence.

    Args:
        section: Data section; `block_size` is the maximum length of a sequence for every kind.
        config: Config of the model. Of a vision-language model, its text config counts. Without
            `max_position_embeddings`, there is no limit.

    Raises:
        DataError: If sequences may be longer.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and section.block_size > most:
        raise DataError(
            f"data.block_size: {section.block_size:,} tokens are more than {config.model_type} has positions for "
            f"(max_position_embeddings {most:,}): set it to {most:,} at most"
        )


@dataclass(frozen=True)
class Step:
    """Function of a row with its settings, for `Dataset.map`.

    `datasets` caches the results of a step, and identifies a function by its name, at the top level of a module. The
    step includes the version of this package, since the function may differ in another version.
    """

    function: Callable[..., dict[str, Any]]
    settings: Mapping[str, Any]
    version: str = __version__

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Apply the function to a row."""
        return self.function(row, **self.settings)
