"""The task `classification`: accuracy at a GLUE task, asked of a causal language model."""

from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM

from ..attacks import find_text_attack
from ..data import Question
from ..data.digests import digest_rows
from ..data.glue import EMBEDDED, make_question, read_glue
from ..errors import ConfigError, DataError
from ..evaluation import score_choices
from .accuracy import Accuracy
from .plan import Cell, RobustnessSettings
from .questions import QuestionTask, select_rows
from .store import Store
from .subject import load_tokenizer
from .task import open_subjects, source_of_text


class ClassificationTask(QuestionTask):
    """Sentences of a GLUE task, and the same attacked; prompt and answers around them stay as they are."""

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        path, name = _data_of(settings)
        self.subjects = open_subjects(settings, AutoModelForCausalLM)
        sources = {role: source_of_text(settings, subject) for role, subject in self.subjects.items()}
        self.tokenizers = {role: load_tokenizer(*source) for role, source in sources.items()}
        self.notes, self.store, self.cells = [], store, settings.cells()
        self.batch_size = settings.batch_size
        self.glue, rows = read_glue(path, name, None, self.notes)
        self.source, table, self.names = select_rows(rows, settings)
        self.sentences = [{column: str(row[column]) for column in self.glue.columns} for row in table]
        self.answers = np.array(table["answer"][:])
        self.scale = Accuracy(self.glue.metrics)
        self._attacked = {cell: self._attack(cell) for cell in self.cells}
        for role in self.subjects:
            self._check_lengths(role)

    def told(self, measured: Any) -> dict[str, Any]:
        """What was asked, and the attacks' shares."""
        rates = {cell.attack: list(find_text_attack(cell.attack).rates) for cell in self.cells}
        return {"rates": rates, **super().told(measured)}

    def identity(self, role: str, cell: Cell | None) -> dict[str, Any]:
        """The tokens of all questions."""
        return {"questions": digest_rows([q.prompt, q.choices] for q in self._questions(role, cell))}

    def choose(self, role: str, cell: Cell | None) -> dict[str, np.ndarray]:
        """The likeliest answers."""
        scores = score_choices(
            self.subjects[role].model,
            self._questions(role, cell),
            batch_size=self.batch_size,
            progress=f"Asking {role}, {cell or 'clean'}",
            total=len(self.answers),
        )
        return {"chosen": scores.chosen}

    def _attack(self, cell: Cell) -> list[dict[str, str]]:
        attack = find_text_attack(cell.attack)
        rate = attack.rate(cell.severity)
        attacked = [
            {column: attack(text, rate, seed=cell.seed, name=f"{name} {column}") for column, text in texts.items()}
            for name, texts in zip(self.names, self.sentences, strict=True)
        ]
        if attacked == self.sentences:
            raise DataError(
                f"{self.source}: {cell.attack} at severity {cell.severity} changes nothing in {len(attacked)} "
                f"questions: it is an attack where {attack.what}; take another"
            )
        return attacked

    def _questions(self, role: str, cell: Cell | None) -> list[Question]:
        forms = self.sentences if cell is None else self._attacked[cell]
        answers = self.answers.tolist()
        return [
            make_question(self.glue, sentences, answer, self.tokenizers[role])
            for sentences, answer in zip(forms, answers, strict=True)
        ]

    def _check_lengths(self, role: str) -> None:
        subject = self.subjects[role]
        most = subject.max_tokens
        if most is None:
            return
        for cell in (None, *self.cells):
            longest = max(len(q.prompt) + max(map(len, q.choices)) for q in self._questions(role, cell))
            if longest > most:
                raise ConfigError(
                    f"eval: {cell or 'clean'}: a question has {longest} tokens, and `{subject.source}` takes {most}: "
                    "take other data, or a model that takes more"
                )


def _data_of(settings: RobustnessSettings) -> tuple[str | None, str]:
    """Path and name of the GLUE task."""
    if settings.name is not None and settings.data != EMBEDDED:
        return settings.data, settings.name
    if settings.data not in (None, EMBEDDED):
        raise ConfigError(f"eval: {settings.data}: whose columns and labels are these? Name the GLUE task with --name")
    if settings.name is not None:
        raise ConfigError(f"eval: --data {EMBEDDED} is a stand-in, of no GLUE task: leave --name out")
    return EMBEDDED, ""
