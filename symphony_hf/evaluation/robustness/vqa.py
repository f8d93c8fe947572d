"""The task `vqa`: accuracy at questions about images, clean and corrupted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

from symphony_hf.data.images.decoding import decode
from symphony_hf.data.images.processors import Asked, make_asker
from symphony_hf.data.images.questions import digest_of, read_visual, visual_examples
from symphony_hf.data.messages import Message
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.attacks.image import enlarged, find_image_attack, library_version
from symphony_hf.evaluation.checkpoint import ModelUnderTest, fingerprint_of, load_processor
from symphony_hf.evaluation.generation import answer_freely, choose_answers
from symphony_hf.evaluation.multiple_choice import MAX_ANSWERS
from symphony_hf.evaluation.settings import AttackCase

from .metric_reports import Accuracy
from .questions import QuestionTask, check_number, select_rows
from .settings import RobustnessSettings
from .task import Store

_MAX_NEW_TOKENS = 32


class VisualTask(QuestionTask):
    """The first question of each conversation about images. Clean images have the size of corrupted ones."""

    auto_class = AutoModelForImageTextToText

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        self.version = library_version()
        super().__init__(settings, store)
        for checkpoint in self.models_under_test.values():
            _check_vision(checkpoint)
        self.processors = {role: fingerprint_of(*source) for role, source in self.sources.items()}
        self.askers = {role: make_asker(load_processor(*source), self.notes) for role, source in self.sources.items()}
        self.notes = list(dict.fromkeys(self.notes))
        self.max_new_tokens = settings.max_new_tokens or _MAX_NEW_TOKENS
        self.source, table, names = select_rows(read_visual(settings.data, settings.images), settings)
        self.examples = visual_examples(table, names, self.source, self.notes)
        check_number(self.source, len(self.examples))
        self.digest = digest_of(self.examples)
        self.choices = self._choices_to_give(settings)
        if self.choices and settings.max_new_tokens is not None:
            self.notes.append(
                f"answers are chosen among {len(self.choices)}, so `max_new_tokens` has no effect: to generate "
                "them, set --answers free"
            )
        right = [example.answer for example in self.examples]
        self.answers = np.array([self.choices.index(answer) if self.choices else 1 for answer in right])
        self.report = Accuracy()
        for role in self.models_under_test:
            self._check_tokens(role)

    def describe(self, measured: Any) -> dict[str, Any]:
        """Describe the questions and how they are answered."""
        answers = f"choosing among {len(self.choices)}" if self.choices else "in words"
        entries = super().describe(measured)
        return {"documents": entries["documents"] | {"answers": answers, "corruptions": self.version}}

    def inputs(self, role: str, case: AttackCase | None) -> dict[str, Any]:
        """Return the questions, how they are asked, and the corruption of their images."""
        return {
            "examples": self.digest,
            "processor": self.processors[role],
            "choices": self.choices or self.max_new_tokens,
            "cell": case and [*case, self.version],
        }

    def choose(self, role: str, case: AttackCase | None) -> dict[str, np.ndarray]:
        """Return the most likely answers; or, for free answers, 1 where they are correct, and the answers `given`."""
        model, asker, asked = self.models_under_test[role].model, self.askers[role], self._asked(case)
        bar: dict[str, Any] = {"progress": f"Asking {role}, {case or 'clean'}", "total": len(self.examples)}
        if self.choices:
            scores = choose_answers(model, asker, asked, self.choices, batch_size=self.batch_size, **bar)
            return {"chosen": scores.chosen}
        free = answer_freely(model, asker, asked, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, **bar)
        return {"chosen": free.correct.astype(np.int64), "given": np.array(free.given, dtype=np.str_)}

    def _check_tokens(self, role: str) -> None:
        """Check that a model has an embedding for each token of the questions, and of answers to choose from.

        Corruptions do not change them. The placeholder of an image needs none, since image features take its place.
        """
        renderer, ids = self.askers[role].renderer, set[int]()
        for example in self.examples:
            answer: list[Message] = [{"role": "assistant", "content": example.answer}] if self.choices else []
            ids.update(renderer.ids(renderer.text([*example.messages, *answer], to_answer=not answer)))
        ids.discard(renderer.tokenizer.convert_tokens_to_ids(renderer.image_token))
        self.models_under_test[role].check_vocabulary(max(ids))

    def _asked(self, case: AttackCase | None) -> Iterator[Asked]:
        for example in self.examples:
            images = [enlarged(decode(image)) for image in example.images]
            if case is not None:
                attack, names = find_image_attack(case.attack), (f"{example.name} {n}" for n in range(len(images)))
                pairs = zip(images, names, strict=True)
                images = [attack(image, case.severity, seed=case.seed, name=name) for image, name in pairs]
            yield Asked(example, images)

    def _choices_to_give(self, settings: RobustnessSettings) -> list[str]:
        """Return the answers to choose from; none for free answers."""
        different = sorted({example.answer for example in self.examples})
        if settings.answers == "free" or (settings.answers is None and len(different) > MAX_ANSWERS):
            return []
        if len(different) < 2:
            raise ConfigError(
                f"eval: {self.source}: all answers are {different[0]!r}: let models answer, --answers free"
            )
        return different


def _check_vision(checkpoint: ModelUnderTest) -> None:
    if type(checkpoint.config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"`{checkpoint.source}`: {checkpoint.config.model_type} takes no images, or answers no questions "
            "about them: --task vqa is for vision-language models"
        )
