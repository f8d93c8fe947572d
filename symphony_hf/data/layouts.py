"""Layouts of columns that TRL's SFTTrainer reads, and the training arguments that each of them allows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from symphony_hf.errors import ConfigError, DataError

from .rows import require_columns

if TYPE_CHECKING:
    from datasets import Dataset

    from symphony_hf.recipe import DataSection


TEXT_COLUMN = "text"
"""Column that TRL reads text from, whatever its name in the source."""


@dataclass(frozen=True)
class Layout:
    """Columns of a source that hold what a model is trained on: messages, if conversational, or plain text."""

    columns: tuple[str, ...]
    conversational: bool = True

    @property
    def has_completion(self) -> bool:
        """Whether TRL leaves the prompt out of the loss unless `completion_only_loss` is false."""
        return "completion" in self.columns

    def describe(self) -> str:
        """Return the columns and their kind, for notes and errors."""
        kind = "messages" if self.conversational else "text"
        return f"{' and '.join(f'`{column}`' for column in self.columns)} ({kind})"


_CANDIDATES = (("messages",), ("conversations",), ("prompt", "completion"))


def find_layout(rows: "Dataset", text_column: str, where: str) -> Layout:
    """Return the layout of a table. Columns of no layout are ignored; `text_column` is read if there is no other.

    Raises:
        DataError: If the columns are of no layout, or of several; if they have images or tokens instead of text; or if
            a column holds both text and messages.
    """
    names = set(rows.column_names)
    if names & {"image", "images"}:
        raise DataError(f"{where}: `kind: chat` reads no images: use `kind: llava`, or remove the column of images")
    found = [columns for columns in _CANDIDATES if names.issuperset(columns)]
    if len(found) > 1:
        several = " and ".join(Layout(columns).describe().rpartition(" ")[0] for columns in found)
        raise DataError(
            f"{where}: rows have the columns of {len(found)} layouts ({several}), which TRL reads differently: "
            "keep the columns of one"
        )
    if found:
        kinds = {column: _holds_text(rows, column, where) for column in found[0]}
        if len(set(kinds.values())) > 1:
            raise DataError(
                f"{where}: one of `prompt` and `completion` is text and the other is messages, which TRL cannot join: "
                "make both text, or both lists of messages"
            )
        return Layout(found[0], conversational=len(found[0]) == 1 or not kinds["prompt"])
    if text_column in names:
        return Layout((text_column,), conversational=False)
    _refuse(rows, where)


def _holds_text(rows: "Dataset", column: str, where: str) -> bool:
    """Return whether a column holds text rather than messages. One that holds both, as from JSON, raises DataError."""
    import datasets

    feature = rows.features[column]
    if isinstance(feature, datasets.Value):
        return True
    if hasattr(feature, "feature"):  # a list
        return False
    kinds = {type(value) for value in rows[column]}
    if {str, list} <= kinds:
        raise DataError(
            f"{where}: `{column}` is text in some rows and messages in others, which TRL cannot read together: give "
            "every row one form"
        )
    return str in kinds


def _refuse(rows: "Dataset", where: str) -> NoReturn:
    """Raise DataError, with the column that is missing."""
    names = set(rows.column_names)
    if {"instruction", "output"} <= names:
        raise DataError(
            f"{where}: these are Alpaca's columns, which TRL does not read either: join `instruction` and `input` into "
            "a column `prompt`, and rename `output` to `completion`"
        )
    if "input_ids" in names:
        raise DataError(
            f"{where}: these rows are tokenized (`input_ids`), and nothing says by which tokenizer: give their text "
            "or messages"
        )
    nearest_layout = max(_CANDIDATES, key=lambda columns: len(names.intersection(columns)))
    require_columns(rows, nearest_layout, where)
    raise AssertionError("a layout is complete, and was not found")


def check_arguments(layout: Layout, section: "DataSection", train: Mapping[str, Any], where: str) -> None:
    """Refuse settings that have no effect on a layout, or contradict the data section.

    Args:
        layout: Layout of the data.
        section: Data section of the recipe.
        train: Train section of the recipe.
        where: Description of the data for errors.

    Raises:
        ConfigError: If there is such a setting.
    """
    data = f"{where} has {layout.describe()}"
    if train.get("completion_only_loss") and not layout.has_completion:
        instead = ", or set `assistant_only_loss: true`" if layout.conversational else ""
        raise ConfigError(
            f"train: `completion_only_loss: true` has no effect: {data}, and only `prompt` and `completion` have "
            f"completions: leave it out{instead}"
        )
    for name in ("assistant_only_loss", "chat_template_path"):
        if train.get(name) and not layout.conversational:
            raise ConfigError(
                f"train: `{name}: {train[name]}` has no effect: {data}, and no chat template is applied to text: leave "
                "it out, or give messages"
            )
    if section.text_column != "text" and layout.columns != (section.text_column,):
        raise ConfigError(f"data: `text_column: {section.text_column}` has no effect: {data}: leave it out")
    _check_packing_arguments(section, train)


def _check_packing_arguments(section: "DataSection", train: Mapping[str, Any]) -> None:
    given_by_data = {
        "max_length": ("block_size", section.block_size),
        "packing": ("packing", section.packing),
        "dataset_text_field": ("text_column", TEXT_COLUMN),
    }
    for name, (setting, value) in given_by_data.items():
        if name in train and train[name] != value:
            raise ConfigError(f"train: `{name}: {train[name]}`: in a recipe, `data.{setting}` sets it: change that")
    if train.get("eval_packing") and not section.packing:
        raise ConfigError(
            "train: `eval_packing: true` without `data.packing: true` lets rows of evaluation attend to each other: "
            "leave it out, or set `data.packing: true`"
        )
    strategy = train.get("packing_strategy")
    if strategy is not None and not section.packing:
        raise ConfigError(f"train: `packing_strategy: {strategy}` has no effect without `data.packing: true`")
    if strategy == "wrapped":
        raise ConfigError(
            "train: `packing_strategy: wrapped` lets conversations in one sequence attend to each other, and "
            "`data.packing` keeps them apart: use `bfd` or `bfd_split`"
        )
    if "truncation_mode" in train and section.packing:
        raise ConfigError("train: `truncation_mode` has no effect with `data.packing: true`: leave it out")
    if train.get("dataset_kwargs"):
        raise ConfigError("train: `dataset_kwargs` would skip the tokenization that chat data needs: leave it out")
