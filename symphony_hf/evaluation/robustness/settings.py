"""Settings of `symphony eval`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from symphony_hf.data.images.questions import DIGITS
from symphony_hf.errors import ConfigError, nearest
from symphony_hf.evaluation.settings import IMAGES, TEXT, EvaluationSettings, InputKind, why_no_revision

KINDS = {"text": TEXT, "classification": TEXT, "vqa": IMAGES}
"""Kind of input by task."""

_TASKS = {
    "text_column": ("text",),
    "block_size": ("text",),
    "name": ("classification",),
    "images": ("vqa",),
    "answers": ("vqa",),
    "max_new_tokens": ("vqa",),
}
"""Tasks of the settings that only some tasks have."""


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings(EvaluationSettings):
    """Models, task, data and attacks of a robustness evaluation.

    Args:
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
        seeds: Seeds of the attacks. Intervals treat a document attacked with several seeds as one draw. Attacks on
            images without randomness, such as blurs, run with the first seed alone.
        documents: Maximum number of documents or questions, spread evenly over all; None for all.
        answers: `choose` the likeliest of all correct answers, or generate `free` answers; by default `choose` where
            at most 100 answers differ. For `vqa`.
        max_new_tokens: Maximum length of a free answer, 32 by default; for `vqa`.
        block_size: Number of tokens in a window of clean text, the first of which is given; by default a quarter of the
            models' context length, at most 1024. For `text`.
        batch_size: Number of windows or questions in a batch.
        tokenizer: Tokenizer or processor of both models, where their folders have none.
        against_revision: Branch, tag or commit of the second checkpoint on the Hub.
        output: Folder for result.json, the picture, and the finished cases of an interrupted run.
    """

    against: str | None = None
    task: str = "text"
    name: str | None = None
    images: str | None = None
    seeds: Sequence[int] = (0, 1, 2)
    answers: str | None = None
    max_new_tokens: int | None = None
    against_revision: str | None = None
    output: str = "symphony-eval"

    command: ClassVar[str] = "eval"

    def __post_init__(self) -> None:
        if self.task not in KINDS:
            raise ConfigError(f"{self.command}: no task is named {self.task!r}; {nearest(self.task, KINDS)}")
        for setting, tasks in _TASKS.items():
            if getattr(self, setting) is not None and self.task not in tasks:
                raise ConfigError(
                    f"{self.command}: `{setting}` is of --task {', '.join(tasks)}, not of {self.task}: leave it out"
                )
        super().__post_init__()
        for name in ("attacks", "seeds"):
            self._check_distinct(name)
        if self.answers not in (None, "choose", "free"):
            raise ConfigError(f"{self.command}: `answers` must be choose or free; got {self.answers!r}")

    def without_effect(self) -> dict[str, str | None]:
        no_second = "there is no second model, --against" if self.against is None else why_no_revision(self.against)
        return {
            **super().without_effect(),
            "against_revision": no_second,
            "images": "the handwritten digits have their own images" if self.data in (None, DIGITS) else None,
            "max_new_tokens": "with --answers choose, no answers are generated" if self.answers == "choose" else None,
        }

    @property
    def kind(self) -> InputKind:
        """Kind of input of the task."""
        return KINDS[self.task]

    @property
    def attack_seeds(self) -> Sequence[int]:
        """Seeds of the attacks."""
        return self.seeds

    def models(self) -> dict[str, tuple[str, str | None]]:
        """Return the source and revision of each model by its role."""
        models = {"model": (self.model, self.revision)}
        return models if self.against is None else models | {"against": (self.against, self.against_revision)}

    def _describe_task(self) -> str:
        return f"--task {self.task}"

    def _describe_tasks_of(self, kind: InputKind) -> str:
        return ", or " + " or ".join(f"--task {task}" for task, known in KINDS.items() if known is kind)
