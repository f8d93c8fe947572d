"""What is measured: settings, and the cases that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from symphony_hf.errors import ConfigError, nearest
from symphony_hf.evaluation.attacks.image import IMAGE_ATTACKS, ImageAttack, find_image_attack
from symphony_hf.evaluation.attacks.text import (
    SEVERITIES,
    TEXT_ATTACKS,
    TextAttack,
    check_severity,
    find_text_attack,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Kind(NamedTuple):
    """What a task's input is.

    Attributes:
        what: Its name in messages.
        attacks: That it can be damaged by.
        usual: The one that is taken if none is named.
    """

    what: Literal["text", "images"]
    attacks: Mapping[str, TextAttack | ImageAttack]
    usual: str


_TEXT = Kind("text", TEXT_ATTACKS, "aaa")
_IMAGES = Kind("images", IMAGE_ATTACKS, "gaussian_noise")
KINDS = {"text": _TEXT, "classification": _TEXT, "vqa": _IMAGES}
"""By task."""

_OWN = {
    "text_column": ("text",),
    "block_size": ("text",),
    "name": ("classification",),
    "images": ("vqa",),
    "answers": ("vqa",),
    "max_new_tokens": ("vqa",),
}
"""Settings that only some tasks have."""

_LEAST = {"documents": 1, "block_size": 2, "batch_size": 1, "max_new_tokens": 1}


class AttackCase(NamedTuple):
    """One attacked form of all documents."""

    attack: str
    severity: int
    seed: int

    def __str__(self) -> str:
        return f"{self.attack}-{self.severity}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    """Which models, which task and data, which attacks.

    Args:
        model: Checkpoint to evaluate: a folder, or a name on the Hub.
        against: Second checkpoint to compare it with.
        task: `text`: perplexity of a causal language model. `classification`: accuracy on a GLUE task. `vqa`: accuracy
            on questions about images, of a vision-language model.
        data: Data to evaluate on. For `text`: a text file, table, folder, or data set on the Hub; by default the
            sources of the running Python's library. For `classification`: a table, or a folder of tables, with the
            columns of the GLUE task `name`; by default GLUE on the Hub, or an offline stand-in without `name`. For
            `vqa`: LLaVA's JSON, or a folder of such files; by default scikit-learn's handwritten digits (`digits`).
        name: GLUE task, such as qnli or sst2; for `classification`.
        images: Folder of the images that the JSON names, by default the JSON's own; for `vqa`.
        split: Split of the data: train, validation, test or all. By default all of a single file, and otherwise the
            test split, or the validation split where there is no test split.
        text_column: Column of a table of documents, `text` by default; for `text`.
        attacks: Attacks, or `all`. On text: aaa (the default), keyboard, char_delete, char_insert, char_swap,
            homoglyph, word_drop, word_shuffle. On images: gaussian_noise (the default), shot_noise, impulse_noise,
            defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, brightness, contrast,
            elastic_transform, pixelate, jpeg_compression. `all-text` and `all-images` are accepted too.
        severities: Severities of the attacks, from 1 to 5.
        seeds: Seeds of the attacks. Intervals treat a document attacked with several seeds as one draw. Attacks on
            images without randomness, such as blurs, run with the first seed alone.
        documents: Maximum number of documents or questions, spread evenly over all; None for all.
        answers: `choose` the likeliest of all correct answers, or generate `free` answers; by default `choose` where
            at most 100 answers differ. For `vqa`.
        max_new_tokens: Maximum length of a free answer, 32 by default; for `vqa`.
        block_size: Number of tokens in a window of clean text, the first of which is given; by default a quarter of the
            models' context length, at most 1024. For `text`.
        batch_size: Number of windows or questions in a batch.
        dtype: Data type of the weights: auto (as stored), float32, bfloat16 or float16.
        tokenizer: Tokenizer or processor of both models, where their folders have none.
        revision: Branch, tag or commit of the model on the Hub.
        against_revision: Branch, tag or commit of the second checkpoint on the Hub.
        output: Folder for result.json, the picture, and the finished cases of an interrupted run.
    """

    model: str
    against: str | None = None
    task: str = "text"
    data: str | None = None
    name: str | None = None
    images: str | None = None
    split: str | None = None
    text_column: str | None = None
    attacks: Sequence[str] | None = None
    severities: Sequence[int] = SEVERITIES
    seeds: Sequence[int] = (0, 1, 2)
    documents: int | None = 100
    answers: str | None = None
    max_new_tokens: int | None = None
    block_size: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    against_revision: str | None = None
    output: str = "symphony-eval"

    command: ClassVar[str] = "eval"

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise ConfigError(f"{self.command}: no task is named {self.task!r}; {nearest(self.task, KINDS)}")
        object.__setattr__(self, "attacks", _attacks_of(self.command, self.task, self.attacks))
        for setting, tasks in _OWN.items():
            if getattr(self, setting) is not None and self.task not in tasks:
                raise ConfigError(
                    f"{self.command}: `{setting}` is of --task {', '.join(tasks)}, not of {self.task}: leave it out"
                )
        for severity in self.severities:
            check_severity(severity)
        for name in ("attacks", "severities", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{self.command}: `{name}` must be one or more, each once; got {values}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{self.command}: `{name}` must be at least {least}, got {value}")
        if self.split not in (None, "train", "validation", "test", "all"):
            raise ConfigError(f"{self.command}: `split` must be train, validation, test or all; got {self.split!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.command}: `dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.answers not in (None, "choose", "free"):
            raise ConfigError(f"{self.command}: `answers` must be choose or free; got {self.answers!r}")

    def cases(self) -> list[AttackCase]:
        """All attacked forms, in the order in which they are measured."""
        cases = []
        for attack in self.attacks or ():
            found = KINDS[self.task].attacks[attack]
            seeds = self.seeds if isinstance(found, TextAttack) or found.is_random else self.seeds[:1]
            cases += [AttackCase(attack, severity, seed) for severity in self.severities for seed in seeds]
        return cases

    def models(self) -> dict[str, tuple[str, str | None]]:
        """The models by the role that they have, each with its revision."""
        named: dict[str, Any] = {"model": (self.model, self.revision)}
        return named if self.against is None else named | {"against": (self.against, self.against_revision)}


def _attacks_of(command: str, task: str, names: Sequence[str] | None) -> tuple[str, ...]:
    """The attacks that are meant.

    Raises:
        ConfigError: If there is no such attack, or it damages what the task has none of.
    """
    kind = KINDS[task]
    if names is None:
        return (kind.usual,)
    chosen: list[str] = []
    for name in names:
        if name in ("all", f"all-{kind.what}"):
            chosen += kind.attacks
            continue
        if name not in kind.attacks:
            _refuse_attack(command, task, kind, name)
        chosen.append(name)
    return tuple(chosen)


def _refuse_attack(command: str, task: str, kind: Kind, name: str) -> None:
    other = _TEXT if kind is _IMAGES else _IMAGES
    if name in other.attacks or name == f"all-{other.what}":
        this, instead = f"symphony {command}", ""
        if command == RobustnessSettings.command:  # no other has tasks
            tasks = " or ".join(f"--task {known}" for known, of in KINDS.items() if of is other)
            this, instead = f"--task {task}", f", or {tasks}"
        raise ConfigError(
            f"{command}: {name} is an attack on {other.what}, and {this} attacks {kind.what}: take one of "
            f"{', '.join(kind.attacks)}{instead}"
        )
    if kind is _IMAGES:
        find_image_attack(name)
    find_text_attack(name)
