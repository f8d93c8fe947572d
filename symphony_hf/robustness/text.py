"""The task `text`: perplexity of documents."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM

from ..attacks import find_text_attack
from .documents import prepare_texts
from .measure import TextMeasurer, default_block_size
from .perplexity import Perplexity
from .plan import RobustnessSettings
from .scores import TextScores
from .store import Store
from .subject import load_tokenizer
from .task import Measured, Task, open_subjects, source_of_text


class TextTask(Task[TextScores]):
    """Documents in windows, and their attacked forms in windows of the same words."""

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        self.subjects = open_subjects(settings, AutoModelForCausalLM)
        sources = {role: source_of_text(settings, subject) for role, subject in self.subjects.items()}
        self.tokenizers = {role: load_tokenizer(*source) for role, source in sources.items()}
        self.texts = prepare_texts(settings)
        self.block_size = settings.block_size or default_block_size(list(self.subjects.values()))
        self.measurer = TextMeasurer(self.texts, self.block_size, settings.batch_size, store)
        self.scale = Perplexity(self.measurer.names)
        self.attacks = settings.attacks or ()
        self.settings = dataclasses.asdict(settings) | {"block_size": self.block_size}
        self.notes = []

    def measure(self, role: str) -> Measured[TextScores]:
        """See `TextMeasurer`."""
        return self.measurer.measure(self.subjects[role], self.tokenizers[role], role)

    def told(self, measured: Mapping[str, Measured[TextScores]]) -> dict[str, Any]:
        """What was evaluated on."""
        clean = measured["model"].clean
        return {
            "settings": self.settings,
            "rates": {name: list(find_text_attack(name).rates) for name in self.attacks},
            "documents": {
                "source": self.texts.source,
                "number": len(self.texts.documents),
                "unit": "documents",
                "words": int(clean.num_words.sum()),
                "bytes": int(clean.num_bytes.sum()),
            },
        }
