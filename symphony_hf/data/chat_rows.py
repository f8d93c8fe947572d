"""Conversion and check of one row of chat data, with the tokens that TRL will keep in the loss."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from symphony_hf.errors import ConfigError

from .chat_template import REFUSED
from .layouts import TEXT_COLUMN, Layout
from .messages import ROLES_WITH_TOOLS, to_messages
from .questions import common_length
from .rows import PROBLEM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOOLS, KEYWORDS = "tools", "chat_template_kwargs"
"""Columns that TRL passes to the chat template with each conversation."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marker of the assistant's tokens in a chat template."""


@dataclass(frozen=True)
class RowSettings:
    """How TRL will tokenize rows, and which tokens it will keep in the loss.

    Args:
        layout: Layout of the rows.
        completion_only: Whether prompts are left out of the loss.
        assistant_only: Whether all but the assistant's turns is left out.
        own_template: Whether the tokenizer's chat template renders the rows; otherwise, TRL sets another one first.
        chat_template: Chat template that TRL renders with; the tokenizer's own when None.
        kept: Part of a row that is too long that TRL keeps: its `start`, its `end`, or `all`, in several pieces.
    """

    layout: Layout
    completion_only: bool
    assistant_only: bool
    own_template: bool = True
    chat_template: str | None = None
    kept: Literal["start", "end", "all"] = "start"

    @classmethod
    def from_train(cls, layout: Layout, train: Mapping[str, Any]) -> "RowSettings":
        """Read a recipe's train section as TRL does."""
        completion_only = train.get("completion_only_loss")
        kept: Literal["start", "end", "all"] = "end" if train.get("truncation_mode") == "keep_end" else "start"
        return cls(
            layout,
            completion_only=layout.has_completion if completion_only is None else bool(completion_only),
            assistant_only=bool(train.get("assistant_only_loss")),
            own_template=train.get("chat_template_path") is None,
            kept="all" if train.get("packing_strategy") == "bfd_split" else kept,
        )

    def describe_loss(self) -> str:
        """Return which tokens are in the loss."""
        parts = ["completions"] * self.completion_only + ["assistant turns"] * self.assistant_only
        return f"{' and '.join(parts)} only" if parts else "all tokens"


def training_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the chat template that TRL replaces the tokenizer's with for `assistant_only_loss`; None for its own.

    Raises ConfigError if the tokenizer's template does not mark the assistant's tokens, and TRL knows no replacement.
    """
    if _GENERATION.search(tokenizer.get_chat_template()):
        return None
    from trl import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            "train: `assistant_only_loss: true` needs a chat template with `{% generation %}` around the assistant's "
            "turns, and the tokenizer's has none: add it, or leave `assistant_only_loss` out"
        ) from error


def check_row(
    row: Mapping[str, Any], settings: RowSettings, tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> dict[str, Any]:
    """Convert a row to the columns that TRL reads, and check it. TRL keeps `block_size` tokens of it, or splits it.

    Returns:
        `messages`, `prompt` and `completion`, or `text`; `tools` and `chat_template_kwargs`, if a conversation has
        them; and `problem`.
    """
    layout = settings.layout
    sides, problem = _read_conversation(row, layout) if layout.conversational else _read_text(row, layout)
    for_template: dict[str, Any] = {}
    if layout.conversational:
        for_template, template_problem = _read_template_columns(row)
        problem = problem or template_problem
    if not problem and settings.own_template:
        problem = _token_problem(for_template, sides, settings, tokenizer, block_size)
    if problem:
        sides = [[] if layout.conversational else "" for _ in sides]
    return {**for_template, **dict(zip(output_columns(layout), sides, strict=True)), PROBLEM: problem}


def output_columns(layout: Layout) -> tuple[str, ...]:
    """Return the names by which TRL knows the columns of a layout."""
    return layout.columns if layout.has_completion else ("messages" if layout.conversational else TEXT_COLUMN,)


def _read_conversation(row: Mapping[str, Any], layout: Layout) -> tuple[list[Any], str]:
    sides = [row[column] for column in layout.columns]
    for column, side in zip(layout.columns, sides, strict=True):
        if not isinstance(side, list | None):
            return sides, f"no list of turns: {type(side).__name__}"
        if not side:
            return sides, f"nothing in `{column}`"
    messages, problem = to_messages([turn for side in sides for turn in side], ROLES_WITH_TOOLS)
    if problem or not layout.has_completion:
        return [messages, []][: len(sides)], problem
    prompt, completion = messages[: len(sides[0])], messages[len(sides[0]) :]
    has_answer = any(message["role"] == "assistant" for message in completion)
    return [prompt, completion], "" if has_answer else "no answer in `completion`"


def _read_template_columns(row: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the columns for the chat template in a form that TRL takes unchecked, and their problem."""
    columns = {name: row[name] for name in (TOOLS, KEYWORDS) if name in row}
    if columns.get(TOOLS) == "":
        columns[TOOLS] = None
    if KEYWORDS in columns and columns[KEYWORDS] is None:
        columns[KEYWORDS] = {}
    if not isinstance(columns.get(KEYWORDS, {}), Mapping):
        return columns, f"`{KEYWORDS}` that is no object: {type(columns[KEYWORDS]).__name__}"
    try:
        tools = _parsed(columns.get(TOOLS))
    except ValueError as error:
        return columns, f"`{TOOLS}` that is no JSON: {error}"
    return columns, "" if isinstance(tools, list | None) else f"`{TOOLS}` that is no list: {type(tools).__name__}"


def _parsed(tools: Any) -> Any:
    return json.loads(tools) if isinstance(tools, str) else tools


def _read_text(row: Mapping[str, Any], layout: Layout) -> tuple[list[Any], str]:
    sides = [row[column] for column in layout.columns]
    for column, side in zip(layout.columns, sides, strict=True):
        if not isinstance(side, str):
            return sides, f"no text in `{column}`: {type(side).__name__}"
        if column != "prompt" and not side.strip():
            return sides, f"no text in `{column}`"
    return sides, ""


def _token_problem(
    for_template: Mapping[str, Any], sides: list[Any], settings: RowSettings, tokenizer: Any, block_size: int
) -> str:
    """Return why a chat template cannot render a row, or that none of the tokens that TRL keeps is in the loss."""
    if settings.completion_only or settings.assistant_only:
        try:
            in_loss = _tokens_in_loss(for_template, sides, settings, tokenizer)
        except TemplateError as error:
            return f"{REFUSED}: {error}"
        kept = {"start": in_loss[:block_size], "end": in_loss[-block_size:], "all": in_loss}[settings.kept]
        if not any(kept):
            return f"no token in the loss among those that are kept: {len(kept)} of {len(in_loss)}"
    elif settings.layout.conversational:
        render = _template_settings(for_template, settings)
        try:  # TRL renders the prompt alone, too
            if settings.layout.has_completion:
                tokenizer.apply_chat_template(sides[0], tokenize=False, add_generation_prompt=True, **render)
            tokenizer.apply_chat_template([message for side in sides for message in side], tokenize=False, **render)
        except TemplateError as error:
            return f"{REFUSED}: {error}"
    return ""


def _tokens_in_loss(
    for_template: Mapping[str, Any], sides: list[Any], settings: RowSettings, tokenizer: Any
) -> list[bool]:
    """Tokenize a row as TRL does, and return whether each token is in the loss."""
    if settings.layout.conversational:
        render = _template_settings(for_template, settings) | {"tokenize": True, "return_dict": True}
        whole = tokenizer.apply_chat_template(
            [message for side in sides for message in side],
            return_assistant_tokens_mask=settings.assistant_only,
            **render,
        )
        ids, in_loss = whole["input_ids"], list(whole.get("assistant_masks", [1] * len(whole["input_ids"])))
        if settings.completion_only:
            prompt = tokenizer.apply_chat_template(sides[0], add_generation_prompt=True, **render)["input_ids"]
    else:
        text = "".join(sides)
        text = text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
        ids, prompt = tokenizer(text=text)["input_ids"], tokenizer(text=sides[0])["input_ids"]
        in_loss = [1] * len(ids)
    if settings.completion_only:
        length = common_length(prompt, ids)
        in_loss[:length] = [0] * length
    return list(map(bool, in_loss))


def _template_settings(for_template: Mapping[str, Any], settings: RowSettings) -> dict[str, Any]:
    tools = _parsed(for_template.get(TOOLS))
    return {"chat_template": settings.chat_template, "tools": tools, **for_template.get(KEYWORDS, {})}
