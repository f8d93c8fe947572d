"""Conversations as lists of messages, whatever their source calls roles and contents."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

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
"""Names of roles in data sets -> the names that chat templates use."""

ROLES_WITH_TOOLS = {**ROLES, "tool": "tool"}


def to_messages(
    turns: Sequence[Mapping[str, Any]] | None, roles: Mapping[str, str] = ROLES
) -> tuple[list[Message], str]:
    """Convert one conversation to the form that chat templates take.

    Turns have `role` and `content`, or ShareGPT's `from` and `value`. Other fields are kept.

    Returns:
        The messages, and their problem: empty, or `<what>: <which>`.
    """
    messages = []
    for turn in turns or ():
        if not isinstance(turn, Mapping):
            return [], f"a turn that is no object: {type(turn).__name__}"
        speaker = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if not isinstance(speaker, str) or speaker not in roles:
            return [], f"an unknown role: {speaker!r}"
        may_be_empty = "tool" in roles and (speaker == "tool" or turn.get("tool_calls"))
        if not may_be_empty and not isinstance(content, str | None):
            return [], f"content that is not a string: {type(content).__name__}"
        if not may_be_empty and not (content and content.strip()):
            return [], f"a turn without text: of {speaker!r}"
        others = {name: value for name, value in turn.items() if name not in ("role", "content", "from", "value")}
        messages.append({"role": roles[speaker], "content": content, **others})
    return messages, _turn_problem(messages)


def _turn_problem(messages: list[Message]) -> str:
    """Require questions and answers in turn, after at most one system message, with tools called in between."""
    roles = [message["role"] for message in messages]
    followed = [*roles[1:], ""]  # a turn in front of a tool's is its call
    roles = [role for role, after in zip(roles, followed, strict=False) if "tool" not in (role, after)]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    for index, role in enumerate(roles):
        if role != ("user", "assistant")[index % 2]:
            return f"roles out of turn: {role!r} as number {index + 1}"
    return "" if "assistant" in roles else "no answer"
