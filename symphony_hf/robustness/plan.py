"""What is measured: settings, and the cells that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..attacks import SEVERITIES, check_severity, find_text_attack
from ..errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Cell(NamedTuple):
    """One attacked form of all documents."""

    attack: str
    severity: int
    seed: int

    def __str__(self) -> str:
        return f"{self.attack}-{self.severity}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    """Which models, which text, which attacks.

    Args:
        model: A checkpoint: a folder, or its name on the Hub.
        against: Another one, to compare it with.
        data: What to evaluate on: a text file, a table, a folder, or a data set of the Hub; the library sources of the
            running Python when None.
        split: Of the data: train, validation, test or all; all of a single file and the test split of anything else
            when None.
        text_column: Of a table.
        attacks: By name, see `TEXT_ATTACKS`.
        severities: From 1 to 5.
        seeds: Of the attacks. A document attacked with several seeds stays one draw of the intervals.
        documents: At most, spread evenly over all; all when None.
        block_size: Tokens of a window of clean text, the first of which is given; a quarter of what the models take,
            and 1024 at most, when None.
        batch_size: Windows a forward.
        dtype: Of the weights: auto (as stored), float32, bfloat16 or float16.
        tokenizer: Of both models, where their folders have none.
        revision: Of the model on the Hub.
        against_revision: Of the other one.
        output: Folder for `result.json` and for what is kept of each cell.
    """

    model: str
    against: str | None = None
    data: str | None = None
    split: str | None = None
    text_column: str = "text"
    attacks: Sequence[str] = ("aaa",)
    severities: Sequence[int] = SEVERITIES
    seeds: Sequence[int] = (0, 1, 2)
    documents: int | None = 100
    block_size: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    against_revision: str | None = None
    output: str = "symphony-eval"

    def __post_init__(self) -> None:
        for attack in self.attacks:
            find_text_attack(attack)
        for severity in self.severities:
            check_severity(severity)
        for name in ("attacks", "severities", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"eval: `{name}` must be one or more, each once; got {values}")
        for name, least in (("documents", 1), ("block_size", 2), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"eval: `{name}` must be at least {least}, got {value}")
        if self.split not in (None, "train", "validation", "test", "all"):
            raise ConfigError(f"eval: `split` must be train, validation, test or all; got {self.split!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"eval: `dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def cells(self) -> list[Cell]:
        """All attacked forms, in the order in which they are measured."""
        return [
            Cell(attack, severity, seed)
            for attack in self.attacks
            for severity in self.severities
            for seed in self.seeds
        ]

    def models(self) -> dict[str, tuple[str, str | None]]:
        """The models by the role that they have, each with its revision."""
        named: dict[str, Any] = {"model": (self.model, self.revision)}
        return named if self.against is None else named | {"against": (self.against, self.against_revision)}
