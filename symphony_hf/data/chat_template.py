"""Chat template and padding token for tokenizers that have none."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from symphony_hf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{%- if message.role == 'tool' or message.tool_calls -%}
{{- raise_exception('the plain template has no tools: name a tokenizer that has its own template') -}}
{%- endif -%}
{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
{%- if message.role == 'assistant' -%}
{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message.content | trim + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- message.role | capitalize + ': ' + message.content | trim -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\nAssistant:' -}}{%- endif -%}
"""
"""Template for a tokenizer without one. Assistant tokens, including the end of text, are marked for the loss."""

REFUSED = "a conversation that the chat template refuses"
"""Problem of a row: some templates take no system message, or expect other turns."""


def plain_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """Return messages as `CHAT_TEMPLATE` renders them, without special tokens. Tools' messages are rendered, too."""
    return "\n".join(f"{message['role'].capitalize()}: {(message['content'] or '').strip()}" for message in messages)


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase", notes: list[str]) -> None:
    """Give a tokenizer without a chat template `CHAT_TEMPLATE`, and add a note.

    Raises:
        DataError: If the tokenizer has no end-of-text token for the template to use.
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
    """Return the id of the padding token; a tokenizer without one gets its end-of-text token, and a note is added.

    Padding is neither attended to nor part of the loss, so the choice of token makes no difference.

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
