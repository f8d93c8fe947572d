"""The tasks of questions with correct answers, and the task `classification`."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForCausalLM

from symphony_hf.data.datasets import digest_rows
from symphony_hf.data.glue import EMBEDDED, make_question, read_glue
from symphony_hf.data.questions import Question
from symphony_hf.data.rows import Rows, thinned
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.text import find_text_attack
from symphony_hf.evaluation.checkpoint import load_tokenizer
from symphony_hf.evaluation.clean_attacked import Measured
from symphony_hf.evaluation.metrics import Choices
from symphony_hf.evaluation.multiple_choice import score_choices
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS

from .metric_reports import Accuracy
from .settings import RobustnessSettings
from .task import Store, Task

if TYPE_CHECKING:
    from datasets import Dataset


class QuestionTask(Task[Choices]):
    """Questions with correct answers.

    Attributes:
        source: Description of the data source.
        answers: Indices of the correct answers. Shape: (questions,).
    """

    source: str
    answers: np.ndarray

    @abstractmethod
    def inputs(self, role: str, case: AttackCase | None) -> dict[str, Any]:
        """Return everything besides the weights that determines the answers, as JSON values."""

    @abstractmethod
    def choose(self, role: str, case: AttackCase | None) -> dict[str, np.ndarray]:
        """Ask all questions. Return the indices of the answers as `chosen`, and other entries to store with them."""

    def score(self, role: str, case: AttackCase | None) -> Choices:
        """Return the answers that a model chooses in one form."""
        stored = self.stored(role, case, self.inputs(role, case), lambda: self.choose(role, case))
        return Choices(stored["chosen"][np.newaxis], self.answers)

    def describe(self, measured: Mapping[str, Measured[Choices]]) -> dict[str, Any]:
        """Describe the questions."""
        return {"documents": {"source": self.source, "number": len(self.answers), "unit": "questions"}}


def select_rows(rows: Rows, settings: RobustnessSettings) -> tuple[str, "Dataset", list[str]]:
    """Select the rows to ask. Return a description, the rows, and the name of each, which is its split and index.

    Raises:
        DataError: If the split does not exist, or has too few rows for an interval.
    """
    import datasets

    is_file = settings.data is not None and Path(settings.data).expanduser().is_file()
    usual = "all" if is_file else next(split for split in ("test", "validation", "train") if split in rows.splits)
    split = settings.split or usual
    if split != "all" and split not in rows.splits:
        raise DataError(f"{rows.source}: no {split} split; it has {', '.join(rows.splits)}: name one with --split")
    splits = list(rows.splits) if split == "all" else [split]
    positions = [(name, position) for name in splits for position in range(len(rows.splits[name]))]
    kept = thinned(positions, settings.documents)
    where = rows.source if split == "all" else f"{rows.source}, {split} split"
    check_number(where, len(kept))
    tables = [rows.splits[name].select([position for own, position in kept if own == name]) for name in splits]
    return where, datasets.concatenate_datasets(tables), [f"{name}[{position}]" for name, position in kept]


def check_number(where: str, number: int) -> None:
    """Check the number of questions.

    Raises:
        DataError: If there are too few for an interval.
    """
    if number < MIN_DOCUMENTS:
        raise DataError(
            f"{where}: {number} questions to ask; intervals need {MIN_DOCUMENTS}: give more, another --split, or raise "
            "--documents"
        )


class ClassificationTask(QuestionTask):
    """A GLUE task, whose sentences are attacked within an unchanged prompt."""

    auto_class = AutoModelForCausalLM

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        path, name = _data_of(settings)
        super().__init__(settings, store)
        self.tokenizers = {role: load_tokenizer(*source) for role, source in self.sources.items()}
        self.glue, rows = read_glue(path, name, None, self.notes)
        self.source, table, self.names = select_rows(rows, settings)
        self.sentences = [{column: str(row[column]) for column in self.glue.columns} for row in table]
        self.answers = np.array(table["answer"][:])
        self.report = Accuracy(self.glue.metrics)
        for attack in settings.attacks or ():
            sentences = [text for texts in self.sentences for text in texts.values()]
            find_text_attack(attack).check_words(sentences, self.source)
        self._attacked = {case: self._attack(case) for case in self.cases}
        for role in self.models_under_test:
            self._check_tokens(role)

    def describe(self, measured: Any) -> dict[str, Any]:
        """Describe the questions and the share of words that each attack changes."""
        rates = {case.attack: list(find_text_attack(case.attack).rates) for case in self.cases}
        return {"rates": rates, **super().describe(measured)}

    def inputs(self, role: str, case: AttackCase | None) -> dict[str, Any]:
        """Return a digest of the tokens of all questions."""
        return {"questions": digest_rows([q.prompt, q.choices] for q in self._questions(role, case))}

    def choose(self, role: str, case: AttackCase | None) -> dict[str, np.ndarray]:
        """Return the most likely answers."""
        scores = score_choices(
            self.models_under_test[role].model,
            self._questions(role, case),
            batch_size=self.batch_size,
            progress=f"Asking {role}, {case or 'clean'}",
            total=len(self.answers),
        )
        return {"chosen": scores.chosen}

    def _attack(self, case: AttackCase) -> list[dict[str, str]]:
        attack = find_text_attack(case.attack)
        rate = attack.rate(case.severity)
        attacked = [
            {column: attack(text, rate, seed=case.seed, name=f"{name} {column}") for column, text in texts.items()}
            for name, texts in zip(self.names, self.sentences, strict=True)
        ]
        if attacked == self.sentences:
            raise DataError(
                f"{self.source}: {case.attack} at severity {case.severity} changes nothing in {len(attacked)} "
                f"questions: in this attack, {attack.what}; use another attack"
            )
        return attacked

    def _questions(self, role: str, case: AttackCase | None) -> list[Question]:
        forms = self.sentences if case is None else self._attacked[case]
        answers = self.answers.tolist()
        return [
            make_question(self.glue, sentences, answer, self.tokenizers[role])
            for sentences, answer in zip(forms, answers, strict=True)
        ]

    def _check_tokens(self, role: str) -> None:
        checkpoint = self.models_under_test[role]
        most = checkpoint.max_tokens
        for case in (None, *self.cases):
            questions = self._questions(role, case)
            checkpoint.check_vocabulary(max(max(ids, default=0) for q in questions for ids in (q.prompt, *q.choices)))
            longest = max(len(q.prompt) + max(map(len, q.choices)) for q in questions)
            if most is not None and longest > most:
                raise ConfigError(
                    f"eval: {case or 'clean'}: a question has {longest} tokens, and `{checkpoint.source}` takes "
                    f"{most}: use other data, or a model with a longer context"
                )


def _data_of(settings: RobustnessSettings) -> tuple[str | None, str]:
    """Return path and name of the GLUE task."""
    if settings.name is not None and settings.data != EMBEDDED:
        return settings.data, settings.name
    if settings.data not in (None, EMBEDDED):
        raise ConfigError(
            f"eval: {settings.data}: the columns and labels of this data are unknown: name its GLUE task with --name"
        )
    if settings.name is not None:
        raise ConfigError(
            f"eval: --data {EMBEDDED} is an offline stand-in and belongs to no GLUE task: leave --name out"
        )
    return EMBEDDED, ""
