"""Conversations about images: LLaVA's files, their batches, and questions for evaluation."""

from .collator import VisualCollator, VisualConversations, VisualRow
from .llava import prepare_llava
from .questions import VisualQuestions

__all__ = [
    "VisualCollator",
    "VisualConversations",
    "VisualQuestions",
    "VisualRow",
    "prepare_llava",
]
