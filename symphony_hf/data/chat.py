"""Conversations and text for TRL's SFTTrainer: data of kind `chat`."""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from symphony_hf.errors import DataError

from .chat_rows import KEYWORDS, TOOLS, RowSettings, check_row, output_columns, training_template
from .chat_template import ensure_chat_template, ensure_padding, plain_text
from .datasets import digest_rows
from .documents import SPLIT_NAMES, split_of
from .embedded import SOURCE, described_names
from .layouts import Layout, check_arguments, find_layout
from .prepared import PreparedData, Step
from .rows import PROBLEM, Rows, cut_held_out, read_rows, thin_rows, without_problems

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import DataSection

_SPLIT_NAMES = {**SPLIT_NAMES, "train_sft": "train", "test_sft": "test"}


def prepare_chat(
    section: "DataSection", tokenizer: "PreTrainedTokenizerBase", seed: int, train: Mapping[str, Any]
) -> PreparedData:
    """Read rows in any layout of TRL's SFTTrainer, which renders, tokenizes and packs them.

    Args:
        section: Data section of a recipe.
        tokenizer: The model's. It is given a chat template where the rows need one, and a padding token.
        seed: Seed of the order of the embedded conversations.
        train: Train section of the recipe.

    Returns:
        Splits with the columns that TRL reads: `messages`, `prompt` and `completion`, or `text`. Splits that the source
        does not have are cut from train, 5% each, by the hash of the conversation.

    Raises:
        DataError: If there are no such rows, the splits differ in layout, or more than a tenth of a split cannot be
            used.
        ConfigError: If a training argument has no effect on the rows.
    """
    notes: list[str] = []
    rows = _embedded(seed) if section.path is None else _read(section)
    layout = _common_layout(rows, section)
    check_arguments(layout, section, train, rows.source)
    settings = RowSettings.from_train(layout, train)
    if layout.conversational and settings.own_template:
        ensure_chat_template(tokenizer, notes)
        if settings.assistant_only:
            settings = dataclasses.replace(settings, chat_template=training_template(tokenizer))
    if not layout.conversational and tokenizer.eos_token is None:
        raise DataError(f"{type(tokenizer).__name__} has no end-of-text token to end a text with: set its `eos_token`")
    ensure_padding(tokenizer, notes)
    step = Step(check_row, {"settings": settings, "tokenizer": tokenizer, "block_size": section.block_size})
    splits = {
        split: _checked(table, step, layout, f"{rows.source}, {split} split", notes)
        for split, table in rows.splits.items()
    }
    splits = {split: thin_rows(table, section.limit) for split, table in cut_held_out(splits, _split_key).items()}
    for split, table in splits.items():
        if len(table) == 0:
            raise DataError(
                f"{rows.source}: no row for the {split} split; give three different rows or more, or a folder with "
                "a table for each of train, validation and test"
            )
    counts = ", ".join(f"{len(splits[split]):,} {split}" for split in splits)
    notes.append(f"{rows.source}: {counts} rows of {layout.describe()}; loss on {settings.describe_loss()}")
    return PreparedData(
        "chat", splits["train"], splits["validation"], splits["test"], revision=rows.revision, notes=notes
    )


def read_conversations(section: "DataSection") -> list[str]:
    """Return the text of each row that a model is trained on, to train a tokenizer on: see `plain_text`.

    Raises:
        DataError: As `prepare_chat`.
    """
    rows = _read(section)
    layout = _common_layout(rows, section)
    settings = RowSettings(layout, completion_only=False, assistant_only=False, own_template=False)
    step = Step(check_row, {"settings": settings, "tokenizer": None, "block_size": section.block_size})
    table = _checked(rows.splits["train"], step, layout, f"{rows.source}, train split", [])
    table = cut_held_out({**rows.splits, "train": table}, _split_key)["train"]
    columns = output_columns(layout)
    sides_of: Iterator[list[Any]] = ([row[name] for name in columns] for row in thin_rows(table, section.limit))
    if layout.conversational:
        return [plain_text(message for side in sides for message in side) for sides in sides_of]
    return ["".join(sides) for sides in sides_of]


def _read(section: "DataSection") -> Rows:
    assert section.path is not None
    instead = "give a file with a column `messages`"
    return read_rows(section.path, section.name, section.revision, instead=instead, names=_SPLIT_NAMES)


def _common_layout(rows: Rows, section: "DataSection") -> Layout:
    """Return the layout of all splits.

    Raises:
        DataError: If they differ, since TRL decides by the train split which tokens are in every split's loss.
    """
    layouts = {
        split: find_layout(table, section.text_column, f"{rows.source}, {split} split")
        for split, table in rows.splits.items()
    }
    train = layouts["train"]
    for split, layout in layouts.items():
        if layout != train:
            raise DataError(
                f"{rows.source}: the train split has {train.describe()} and the {split} split {layout.describe()}, so "
                "their losses would be of different tokens: give all splits the same columns"
            )
    return train


def _checked(rows: "Dataset", step: Step, layout: Layout, where: str, notes: list[str]) -> "Dataset":
    """Return the rows that can be used, with the columns that TRL reads."""
    import datasets

    kept = [name for name in (TOOLS, KEYWORDS) if layout.conversational and name in rows.column_names]
    empty = [name for name in kept if rows.features[name] == datasets.Value("null")]
    rows, kept = rows.remove_columns(empty), [name for name in kept if name not in empty]
    if KEYWORDS in kept and isinstance(rows.features[KEYWORDS], datasets.Value):
        kind = rows.features[KEYWORDS].dtype
        raise DataError(f"{where}: column `{KEYWORDS}` is {kind}, not objects: give each row an object, or none")
    feature = _messages_feature if layout.conversational else lambda _: datasets.Value("string")
    columns = {
        name: feature(rows.features[source])
        for name, source in zip(output_columns(layout), layout.columns, strict=True)
    }
    features = {**{name: rows.features[name] for name in kept}, **columns, PROBLEM: datasets.Value("string")}
    rows = rows.map(
        step,
        remove_columns=[name for name in rows.column_names if name not in kept],
        features=datasets.Features(features),
        desc="Checking rows",
    )
    return without_problems(rows, where, notes)


def _messages_feature(feature: Any) -> Any:
    """Return the type of a column of messages that keeps the fields beside role and content."""
    import datasets

    turn = getattr(feature, "feature", None)
    if "Json" in (type(feature).__name__, type(turn).__name__):  # objects whose fields differ, which are kept as JSON
        return feature
    text, fields = datasets.Value("string"), turn if isinstance(turn, dict) else {}
    others = {name: value for name, value in fields.items() if name not in ("role", "content", "from", "value")}
    return datasets.List({"role": text, "content": text, **others})


def _split_key(row: Mapping[str, Any]) -> str:
    """Return the text that decides a row's split, the same for a conversation in any layout."""
    if "text" in row:
        return row["text"]
    if "messages" in row:
        messages = row["messages"]
    elif isinstance(row["prompt"], str):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    else:
        messages = [*row["prompt"], *row["completion"]]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _embedded(seed: int) -> Rows:
    """Return questions about Python's library, answered by its docstrings, with the same splits for every seed."""
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
