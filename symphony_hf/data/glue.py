"""Data of kind `glue`: GLUE tasks as questions in text, with a choice of answers."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from symphony_hf.errors import DataError

from .blocks import NO_LABEL, PadCollator
from .chat_template import ensure_padding
from .corpus import hub_name
from .datasets import digest_rows, has_configuration
from .documents import SPLIT_NAMES, split_of
from .embedded import SOURCE, Described, described_names
from .glue_tasks import STAND_IN, GlueTask, find_task
from .prepared import PreparedData, Step
from .questions import Question, tokenize_choices
from .rows import PROBLEM, Rows, cut_held_out, read_rows, require_columns, thin_rows, without_problems

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import DataSection

HUB = "nyu-mll/glue"
EMBEDDED = "embedded"
"""Value of `data.path` for the stand-in."""

_HIDDEN = {-1, None}
"""Labels of rows whose true labels are not published."""

_SHORT = 80
"""Maximum number of characters of a sentence of the stand-in, so that it fits the short blocks of small models."""

_LENGTH = "num_tokens"
"""Column with the number of tokens of a question and its right answer."""


class LabelledQuestions(Dataset[dict[str, list[int]]]):
    """Dataset of questions and their right answers for the Trainer. Only the answer's tokens are in the loss.

    Its `rows` are a table with the columns `prompt`, `choices` and `answer`; see `Question`.
    """

    def __init__(self, rows: "Table") -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return `input_ids` and `labels` of one question and its right answer."""
        question = self.question(index)
        answer = question.choices[question.answer]
        return {"input_ids": question.prompt + answer, "labels": [NO_LABEL] * len(question.prompt) + answer}

    def question(self, index: int) -> Question:
        """Return one question with all its answers, for `evaluation.multiple_choice.score_choices`."""
        row = self.rows[index]
        return Question(row["prompt"], row["choices"], row["answer"])

    def questions(self) -> list[Question]:
        """Return all questions."""
        return [self.question(index) for index in range(len(self))]


def prepare_glue(section: "DataSection", tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Read the rows of a task and turn them into questions.

    Args:
        section: Data section of a recipe. `name` is the task. It is read from the Hub without `path`; with
            `path: embedded`, a stand-in takes its place.
        tokenizer: The model's tokenizer. It is given a padding token if it has none.

    Returns:
        Splits of `LabelledQuestions`. `test` is None if its labels are hidden, as GLUE's own are.

    Raises:
        DataError: If there is no such task, file, column or label; if a split is empty; if more than a tenth of the
            training rows, or any other row, is longer than `block_size`.
    """
    notes: list[str] = []
    pad_id = ensure_padding(tokenizer, notes)
    assert section.name is not None
    find_task(section.name)  # of the stand-in too, so that a mistyped name does not pass there
    task, rows = read_glue(section.path, section.name, section.revision, notes)
    splits = {}
    for split, table in rows.splits.items():
        where = f"{rows.source}, {split} split"
        table = _tokenized(thin_rows(table, section.limit), task, tokenizer, section)
        if split != "train":
            _check_whole(table, where, section.block_size)
        splits[split] = LabelledQuestions(without_problems(table, where, notes))
    notes.append(f"{rows.source}: " + ", ".join(f"{len(splits[s]):,} {s} questions" for s in splits))
    return PreparedData(
        kind="glue",
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        collator=PadCollator(pad_id),
        revision=rows.revision,
        num_tokens=sum(splits["train"].rows[_LENGTH][:]),
        notes=notes,
    )


def read_glue(path: str | None, name: str, revision: str | None, notes: list[str]) -> tuple[GlueTask, Rows]:
    """Read the sentences and right answers of a task.

    Args:
        path: Table, folder of tables, or data set of the Hub with the task's columns; `embedded` for a stand-in that
            belongs to no GLUE task; GLUE on the Hub when None.
        name: Name of the task.
        revision: Branch, tag or commit on the Hub.
        notes: List that notes on the data are added to.

    Returns:
        The task, and rows with its columns and `answer`, the index of the right answer. Rows that lack a sentence are
        left out.

    Raises:
        DataError: If there is no such task, file, column or label, or more than a tenth of a split lacks a sentence.
    """
    if path == EMBEDDED:
        notes.append(f"no GLUE: a stand-in made of the {SOURCE}, for trying things out")
        return STAND_IN, _stand_in()
    task = find_task(name)
    return task, _read(path or HUB, revision, task, notes)


def is_embedded(kind: str, path: str | None) -> bool:
    """Whether a recipe's data needs no file and no download. GLUE without a path is the Hub's."""
    return path == (EMBEDDED if kind == "glue" else None)


def describe_data(data: Mapping[str, Any]) -> str:
    """Return the name of a recipe's data: its path, GLUE's task on the Hub, or that it is embedded."""
    kind = data.get("kind", "text")
    if is_embedded(kind, data["path"]):
        return f"embedded {kind} data"
    return f"GLUE {data['name']}" if data["path"] is None else str(data["path"])


def make_question(task: GlueTask, sentences: Mapping[str, Any], answer: int, tokenizer: Any) -> Question:
    """Return a task's question about sentences, in tokens.

    Args:
        task: Task with the prompt and the answers.
        sentences: Sentences by the task's columns.
        answer: Index of the right answer.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: If the tokenizer cannot tell the answers apart.
    """
    prompt = task.prompt.format(**{column: sentences[column] for column in task.columns})
    return Question(*tokenize_choices([f"{prompt} {choice}" for choice in task.answers], tokenizer), answer)


def _read(path: str, revision: str | None, task: GlueTask, notes: list[str]) -> Rows:
    names = {task.validation: "validation", **SPLIT_NAMES}
    instead = "give a folder of tables train and validation with GLUE's columns, or `embedded` for a stand-in"
    rows = read_rows(path, _configuration(path, task, revision, instead), revision, instead=instead, names=names)
    splits = dict(rows.splits)
    if "test" in splits and _labels_are_hidden(splits["test"]):
        notes.append(f"{rows.source}: the test split's labels are hidden, so it is left out")
        del splits["test"]
    for split, table in splits.items():
        where = f"{rows.source}, {split} split"
        require_columns(table, [*task.columns, "label"], where)
        # Before rows are held out, so that an error has the number of the row in the source.
        splits[split] = without_problems(_with_answers(table, task, where), where, notes)
    if "validation" not in splits:
        notes.append(f"{rows.source}: no validation split, so 5% of train are held out")
    splits = cut_held_out(splits, lambda row: "\n".join(row[column] for column in task.columns), ("validation",))
    return rows._replace(splits=splits)


def _configuration(path: str, task: GlueTask, revision: str | None, instead: str) -> str | None:
    """Return the configuration of a data set of the Hub: the one in `path`, or the task's if there is one."""
    if path == HUB:
        return task.name
    if Path(path).expanduser().exists():
        return None
    repository, config = hub_name(path)
    return task.name if config is None and has_configuration(repository, task.name, revision, instead) else config


def _labels_are_hidden(table: "Table") -> bool:
    return "label" not in table.column_names or set(table.unique("label")) <= _HIDDEN


def _with_answers(table: "Table", task: GlueTask, where: str) -> "Table":
    """Return the task's sentences, the index of the right answer, and the problem of a row without a sentence.

    Labels are numbers or names.

    Raises:
        DataError: If a row has no label, or one that the task does not have.
    """
    import datasets

    feature = table.features["label"]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    answers = []
    for row, label in enumerate(table["label"][:]):
        if names is not None and label in range(len(names)):
            label = names[label]
        if isinstance(label, float) and label.is_integer():  # a column of CSV in which a number is missing
            label = int(label)
        if label in task.labels:
            label = task.labels.index(label)
        if not isinstance(label, int) or not 0 <= label < len(task.labels):
            known = ", ".join(f"{number} or `{name}`" for number, name in enumerate(task.labels))
            raise DataError(f"{where}: row {row} has the label {label!r}; {task.name} has {known}")
        answers.append(label)
    table = table.select_columns(list(task.columns))
    problems = [""] * len(table)
    for column in task.columns:
        for row, sentence in enumerate(table[column][:]):
            if not isinstance(sentence, str):
                problems[row] = problems[row] or f"no text in `{column}`: {type(sentence).__name__}"
    return table.add_column("answer", answers).add_column(PROBLEM, problems)


def _tokenized(table: "Table", task: GlueTask, tokenizer: "PreTrainedTokenizerBase", section: "DataSection") -> "Table":
    settings = {"task": task, "tokenizer": tokenizer, "block_size": section.block_size}
    return table.map(
        Step(_tokenize, settings),
        remove_columns=list(task.columns),
        desc="Tokenizing questions",
    )


def _tokenize(
    row: Mapping[str, Any], task: GlueTask, tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> dict[str, Any]:
    question = make_question(task, row, row["answer"], tokenizer)
    longest = _longest(question.prompt, question.choices)
    return {
        "prompt": question.prompt,
        "choices": question.choices,
        _LENGTH: len(question.prompt) + len(question.choices[question.answer]),
        PROBLEM: f"longer than block_size: {longest} tokens" if longest > block_size else "",
    }


def _check_whole(table: "Table", where: str, block_size: int) -> None:
    """Refuse rows that are too long: an accuracy without them would be of other questions."""
    long = [row for row, problem in enumerate(table[PROBLEM][:]) if problem]
    if long:
        longest = max(_longest(table[row]["prompt"], table[row]["choices"]) for row in long)
        raise DataError(
            f"{where}: {len(long)} questions have more tokens than block_size {block_size}, {longest} at most; what is "
            f"measured is neither cut nor left out: set data.block_size to {longest}"
        )


def _longest(prompt: list[int], choices: list[list[int]]) -> int:
    return len(prompt) + max(map(len, choices))


def _stand_in() -> Rows:
    """Ask whether a sentence describes a function. Half of them do; the others describe another one of the split."""
    import datasets

    by_split: dict[str, list[Described]] = {"train": [], "validation": [], "test": []}
    for described in described_names():
        if len(described.summary) > _SHORT:
            continue
        by_split[split_of(described.summary)].append(described)
    tables = {}
    for split, members in by_split.items():
        generator = random.Random(0)
        generator.shuffle(members)
        rows = []
        for index, described in enumerate(members):
            belongs = index % 2 == 0
            other = members[index - 1]
            rows.append(
                {
                    "question": f"What does `{described.name}` do?",
                    "sentence": described.summary if belongs else other.summary,
                    "label": STAND_IN.labels[0 if belongs else 1],
                }
            )
        tables[split] = datasets.Dataset.from_list(rows)
    digest = digest_rows(row for table in tables.values() for row in table)
    answered = {split: _with_answers(table, STAND_IN, EMBEDDED) for split, table in tables.items()}
    return Rows({split: table.remove_columns(PROBLEM) for split, table in answered.items()}, digest, EMBEDDED)
