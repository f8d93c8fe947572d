"""What a recipe's data becomes: splits that a Trainer takes, and what a report says of them."""

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
    """Data that is read, checked and ready to train on.

    Attributes:
        kind: Of the data section.
        train: Examples to train on, as a Trainer takes them; conversations, which TRL's SFTTrainer takes, for `chat`.
        validation: Likewise, or None where the source has none.
        test: Likewise.
        collator: Makes a batch of a list of examples; None where the Trainer's own does.
        documents: The test split's texts of kind `text`, whole, for measures by document; None for other kinds.
        revision: The commit of a data set on the Hub; the SHA-256 of what was read otherwise; None where a data set
            says neither.
        num_tokens: Of the train split, before padding; None where only training will tell.
        notes: What a reader of the results should know: rows left out, and why; settings made up.
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
"""Module -> the package that it comes with, where their names differ."""


def require(module: str, purpose: str, extra: str = "vision") -> None:
    """Refuse to begin without a module.

    Args:
        module: That must be importable.
        purpose: What for, in the error message.
        extra: Of this package, that installs it.

    Raises:
        DataError: If it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        package = _PACKAGES.get(module, module)
        raise DataError(f"{purpose} need {package}, which is not installed: pip install 'symphony-hf[{extra}]'")


def check_lengths(section: "DataSection", config: "PretrainedConfig") -> None:
    """Refuse sequences that are longer than the model has positions for.

    Args:
        section: Its `block_size` is the longest sequence of every kind of data.
        config: Of the model; for one with images, its text model's counts. A config that names no limit has none.

    Raises:
        DataError: If they are longer.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and section.block_size > most:
        raise DataError(
            f"data.block_size: {section.block_size:,} tokens are more than {config.model_type} has positions for "
            f"(max_position_embeddings {most:,}): set it to {most:,} at most"
        )


@dataclass(frozen=True)
class Step:
    """A function of a row with its settings, for `Dataset.map`.

    `datasets` finds results of the same step in its cache. It knows a function by its name alone, so this package's
    version is in the step: another one may do something else under the same name.

    Args:
        function: Of a row; at the top of its module.
        settings: What it is called with besides.
        version: Of this package.
    """

    function: Callable[..., dict[str, Any]]
    settings: Mapping[str, Any]
    version: str = __version__

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the function makes of a row."""
        return self.function(row, **self.settings)
