"""What a recipe's data becomes: splits that a Trainer takes, and what a report says of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .documents import Document

if TYPE_CHECKING:
    from ..recipe import DataKind


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
