"""Conversations in one form, `[{"role": ..., "content": ...}, ...]`, from the forms that they are published in."""

from collections.abc import Mapping, Sequence
from typing import Any

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
