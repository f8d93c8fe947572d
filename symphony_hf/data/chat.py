"""Conversations for TRL's SFTTrainer: data of kind `chat`."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import DataError
from .conversations import to_messages
from .digests import digest_rows
from .docstrings import SOURCE, described_names
from .documents import SPLIT_NAMES, split_of
from .prepared import PreparedData
from .rows import Rows, cut_held_out, read_rows, require_columns, thin_rows
from .skipping import PROBLEM, without_problems
from .steps import Step
from .templates import REFUSED, ensure_chat_template, ensure_padding

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..recipe import DataSection

_FORMS = (("messages",), ("conversations",), ("prompt", "completion"))
"""Columns of the forms that are read; the first that is there."""

_SPLIT_NAMES = {**SPLIT_NAMES, "train_sft": "train", "test_sft": "test"}


def prepare_chat(section: "DataSection", tokenizer: "PreTrainedTokenizerBase", seed: int) -> PreparedData:
    """Read conversations into one form, which TRL renders, tokenizes and packs.

    Args:
        section: Of a recipe.
        tokenizer: The model's; it is given a chat template and a padding token where it has none.
        seed: Of the order of the embedded conversations.

    Returns:
        Splits with the one column `messages`. Splits that the source does not have are cut from train, 5% each, by the
        hash of the conversation.

    Raises:
        DataError: If there are no such conversations, or more than a tenth of a split cannot be used.
    """
    notes: list[str] = []
    ensure_chat_template(tokenizer, notes)
    ensure_padding(tokenizer, notes)
    rows = _embedded(seed) if section.path is None else _read(section)
    splits = {
        split: _normalized(table, tokenizer, f"{rows.source}, {split} split", notes)
        for split, table in rows.splits.items()
    }
    splits = {split: thin_rows(table, section.limit) for split, table in cut_held_out(splits, _text).items()}
    for split, table in splits.items():
        if len(table) == 0:
            raise DataError(f"{rows.source}: no conversation for the {split} split; give more, or a split of its own")
    notes.append(f"{rows.source}: " + ", ".join(f"{len(splits[s]):,} {s} conversations" for s in splits))
    return PreparedData(
        "chat", splits["train"], splits["validation"], splits["test"], revision=rows.revision, notes=notes
    )


def _read(section: "DataSection") -> Rows:
    assert section.path is not None
    instead = "give a file with a column `messages`"
    return read_rows(section.path, section.name, section.revision, instead=instead, names=_SPLIT_NAMES)


def _normalized(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", where: str, notes: list[str]) -> "Dataset":
    import datasets

    form = next((form for form in _FORMS if set(form) <= set(rows.column_names)), None)
    if form is None:
        require_columns(rows, _nearest_form(rows.column_names), where)
    assert form is not None
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": datasets.List(message), PROBLEM: datasets.Value("string")})
    rows = rows.map(
        Step(_convert, {"form": form, "tokenizer": tokenizer}),
        remove_columns=rows.column_names,
        features=features,
        desc="Reading conversations",
    )
    return without_problems(rows, where, notes)


def _nearest_form(columns: Sequence[str]) -> tuple[str, ...]:
    """The form that most is there of; `messages` where nothing is."""
    return max(_FORMS, key=lambda form: len(set(form) & set(columns)))


def _convert(row: Mapping[str, Any], form: tuple[str, ...], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    if len(form) == 1:
        turns = row[form[0]]
    else:
        turns = [*_as_turns(row["prompt"], "user"), *_as_turns(row["completion"], "assistant")]
    if not isinstance(turns, list | None):
        return {"messages": [], PROBLEM: f"no list of turns: {type(turns).__name__}"}
    messages, problem = to_messages(turns)
    if not problem:
        try:
            tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            problem = f"{REFUSED}: {error}"
    return {"messages": messages, PROBLEM: problem}


def _as_turns(side: Any, role: str) -> list[Any]:
    """A side of a prompt and completion, which may be a text or turns."""
    return side if isinstance(side, list) else [{"role": role, "content": side}]


def _text(row: Mapping[str, Any]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])


def _embedded(seed: int) -> Rows:
    """Questions about Python's library, answered by its docstrings. A name is in the same split with every seed."""
    import datasets

    described = described_names()
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for name, summary in described:
        turns = [
            {"role": "user", "content": f"What does `{name}` do?"},
            {"role": "assistant", "content": summary},
        ]
        splits[split_of(summary)].append({"messages": turns})
    random.Random(seed).shuffle(splits["train"])
    tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    return Rows(tables, digest_rows(described), SOURCE)
