"""Conversations for TRL's SFTTrainer: data of kind `chat`."""

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from symphony_hf.errors import DataError

from .datasets import digest_rows
from .documents import SPLIT_NAMES, split_of
from .embedded import SOURCE, described_names
from .prepared import PreparedData, Step
from .rows import PROBLEM, Rows, cut_held_out, read_rows, require_columns, thin_rows, without_problems

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import DataSection


Message = dict[str, str]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""How data sets name who speaks -> the name that chat templates know."""


def to_messages(turns: Sequence[Mapping[str, Any]] | None) -> tuple[list[Message], str]:
    """One conversation in the form that chat templates take.

    Args:
        turns: With `role` and `content`, or ShareGPT's `from` and `value`.

    Returns:
        The messages, and what is wrong with them: empty, or `<what>: <which>`.
    """
    messages = []
    for turn in turns or ():
        if not isinstance(turn, Mapping):
            return [], f"a turn that is no object: {type(turn).__name__}"
        speaker = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if speaker not in ROLES:
            return [], f"an unknown role: {speaker!r}"
        if not isinstance(content, str) or not content.strip():
            return [], f"a turn without text: of {speaker!r}"
        messages.append({"role": ROLES[speaker], "content": content})
    return messages, _fault(messages)


def _fault(messages: list[Message]) -> str:
    """Chat templates want a question and an answer in turn, after at most one instruction of the system."""
    roles = [message["role"] for message in messages]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    for place, role in enumerate(roles):
        if role != ("user", "assistant")[place % 2]:
            return f"roles out of turn: {role!r} as number {place + 1}"
    return "" if "assistant" in roles else "no answer"


CHAT_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
{%- if message.role == 'assistant' -%}
{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content | trim + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.role | capitalize + ': ' + message.content | trim -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\nAssistant:' -}}{%- endif -%}
"""
"""For a tokenizer that has none. Answers are marked as what is learned, their end of text included."""


REFUSED = "a conversation that the chat template refuses"
"""A problem of a row, see `skipping`: some templates know no system, or want other turns."""


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase", notes: list[str]) -> None:
    """Give a tokenizer without a chat template the one above, and say so.

    Raises:
        DataError: If it would need an end-of-text token, and the tokenizer has none.
    """
    if tokenizer.chat_template is not None:
        return
    if tokenizer.eos_token is None:
        raise DataError(
            f"{type(tokenizer).__name__} has neither a chat template nor an end-of-text token to end an answer with: "
            "set its `chat_template`, or take the tokenizer of an instruction-tuned model (model.tokenizer)"
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    notes.append("the tokenizer had no chat template; it was given a plain one: `User: ...`, `Assistant: ...`")


def ensure_padding(tokenizer: "PreTrainedTokenizerBase", notes: list[str]) -> int:
    """The token to pad with; the end of text where the tokenizer has no other, which is said.

    Padding is neither attended to nor learned, so which token it is makes no difference.

    Raises:
        DataError: If the tokenizer has no end-of-text token either.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise DataError(
                f"{type(tokenizer).__name__} has neither a padding nor an end-of-text token: set its `pad_token`"
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer had no padding token; its end of text, {tokenizer.eos_token}, pads")
    assert tokenizer.pad_token_id is not None
    return tokenizer.pad_token_id


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
    if form is None and {"instruction", "output"} <= set(rows.column_names):
        raise DataError(
            f"{where}: these are Alpaca's columns, which TRL does not read either: join `instruction` and `input` into "
            "a column `prompt`, and rename `output` to `completion`"
        )
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
