"""What a tokenizer must have to train on conversations: a chat template, and a token to pad with."""

from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
