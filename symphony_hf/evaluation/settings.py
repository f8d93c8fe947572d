"""Settings that `symphony eval` and `symphony routing` share: the checkpoint, its data, and the attacks on the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from symphony_hf.data.datasets import TABLE_FORMATS
from symphony_hf.data.documents import SPLITS
from symphony_hf.errors import ConfigError
from symphony_hf.settings import check_least

from .attacks.image import IMAGE_ATTACKS, ImageAttack, find_image_attack
from .attacks.text import SEVERITIES, TEXT_ATTACKS, TextAttack, check_severity, find_text_attack

DTYPES = ("auto", "float32", "bfloat16", "float16")


class InputKind(NamedTuple):
    """Kind of input that attacks change, with the attacks by name, and the one that is used if none is given."""

    name: Literal["text", "images"]
    attacks: Mapping[str, TextAttack | ImageAttack]
    default: str


TEXT = InputKind("text", TEXT_ATTACKS, "aaa")
IMAGES = InputKind("images", IMAGE_ATTACKS, "gaussian_noise")


class AttackCase(NamedTuple):
    """One attacked form of all inputs."""

    attack: str
    severity: int
    seed: int

    def __str__(self) -> str:
        return f"{self.attack}-{self.severity}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of every evaluation of a checkpoint on clean and attacked inputs.

    Args:
        model: Checkpoint to evaluate: a folder, or a name on the Hub.
        data: Data to evaluate on: a text file, table, folder, or data set on the Hub; by default the sources of the
            running Python's library.
        split: Split of the data: train, validation, test or all. By default all of a single file, and otherwise the
            test split.
        text_column: Text column of a table.
        attacks: Names of attacks, or `all`.
        severities: Severities of the attacks, from 1 to 5.
        documents: Maximum number of documents, spread evenly over all; None for all.
        block_size: Number of tokens in a window of clean text; by default a quarter of the model's context length, at
            most 1024.
        batch_size: Number of windows in a batch.
        dtype: Data type of the weights: auto (as stored), float32, bfloat16 or float16.
        tokenizer: Tokenizer, where the model's folder has none.
        revision: Branch, tag or commit of the model on the Hub.
        output: Folder for the results.
    """

    model: str
    data: str | None = None
    split: str | None = None
    text_column: str | None = None
    attacks: Sequence[str] | None = None
    severities: Sequence[int] = SEVERITIES
    documents: int | None = 100
    block_size: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    output: str

    command: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", self._expand_attacks())
        for severity in self.severities:
            check_severity(severity)
        at_least_one = {name: getattr(self, name, None) for name in ("documents", "batch_size", "max_new_tokens")}
        check_least(self.command, 1, **at_least_one)
        check_least(self.command, 2, block_size=self.block_size)
        if self.split not in (None, *SPLITS, "all"):
            raise ConfigError(f"{self.command}: `split` must be train, validation, test or all; got {self.split!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.command}: `dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        self._check_distinct("severities")
        for setting, reason in self.without_effect().items():
            if reason is not None and getattr(self, setting) != type(self).__dataclass_fields__[setting].default:
                raise ConfigError(f"{self.command}: `{setting}` has no effect, because {reason}: leave it out")

    def without_effect(self) -> dict[str, str | None]:
        """Return, by setting, the reason why it would have no effect beside the others; None where it has one."""
        return {"text_column": _why_no_columns(self.data), "revision": why_no_revision(self.model)}

    @property
    def kind(self) -> InputKind:
        """Kind of input that the attacks change."""
        return TEXT

    @property
    def attack_seeds(self) -> Sequence[int]:
        """Seeds of the attacks."""
        raise NotImplementedError

    def cases(self) -> list[AttackCase]:
        """Return all attacked forms, in the order in which they are measured."""
        cases = []
        for attack in self.attacks or ():
            found = self.kind.attacks[attack]
            seeds = self.attack_seeds if isinstance(found, TextAttack) or found.is_random else self.attack_seeds[:1]
            cases += [AttackCase(attack, severity, seed) for severity in self.severities for seed in seeds]
        return cases

    def _check_distinct(self, name: str) -> None:
        values = list(getattr(self, name))
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{self.command}: `{name}` must be one or more, each once; got {values}")

    def _expand_attacks(self) -> tuple[str, ...]:
        """Return the names of the attacks, with `all` replaced by what it stands for."""
        kind = self.kind
        if self.attacks is None:
            return (kind.default,)
        names: list[str] = []
        for name in self.attacks:
            if name in ("all", f"all-{kind.name}"):
                names += kind.attacks
            elif name in kind.attacks:
                names.append(name)
            else:
                self._refuse_attack(name)
        return tuple(names)

    def _refuse_attack(self, name: str) -> None:
        kind, other = (TEXT, IMAGES) if self.kind is TEXT else (IMAGES, TEXT)
        if name in other.attacks or name == f"all-{other.name}":
            raise ConfigError(
                f"{self.command}: {name} is an attack on {other.name}, and {self._describe_task()} attacks "
                f"{kind.name}: take one of {', '.join(kind.attacks)}{self._describe_tasks_of(other)}"
            )
        if kind is IMAGES:
            find_image_attack(name)
        find_text_attack(name)

    def _describe_task(self) -> str:
        return f"symphony {self.command}"

    def _describe_tasks_of(self, kind: InputKind) -> str:
        """Return the end of a message that names other tasks."""
        return ""


def _why_no_columns(data: str | None) -> str | None:
    if data is None:
        return "without --data, the text is the sources of the running Python's library"
    path = Path(data).expanduser()
    return f"`{data}` is a text file" if path.is_file() and path.suffix.lower() not in TABLE_FORMATS else None


def why_no_revision(source: str) -> str | None:
    """Return why a checkpoint has no revisions; None for one on the Hub."""
    return f"`{source}` is a local folder" if Path(source).expanduser().is_dir() else None
