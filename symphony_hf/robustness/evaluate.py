"""evaluate_robustness: everything that `symphony eval` does with text."""

import dataclasses
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..attacks import find_text_attack
from ..compat import transformers_version
from ..unfinished import write_json
from .documents import prepare_texts
from .measure import TextMeasurer, default_block_size
from .plan import RobustnessSettings
from .store import Store
from .subject import Subject, load_tokenizer
from .summary import summarize


def evaluate_robustness(settings: RobustnessSettings) -> dict[str, Any]:
    """Measure one or two models on documents and on their attacked forms, and say what is more than chance.

    The same call again takes what was measured before from `output/cells`, and goes on from there.

    Args:
        settings: Which models, which text, which attacks.

    Returns:
        As in `output/result.json`: `models`, `comparisons` where there are two, `documents`, `settings`, `versions`.

    Raises:
        SymphonyError: If a model or the data is not to be had, or a number is not finite.
    """
    started = time.perf_counter()
    subjects = {role: Subject(*named, settings.dtype) for role, named in settings.models().items()}
    tokenizers = {
        role: load_tokenizer(settings.tokenizer or subject.source, None if settings.tokenizer else subject.revision)
        for role, subject in subjects.items()
    }
    texts = prepare_texts(settings)
    output = Path(settings.output)
    block_size = settings.block_size or default_block_size(list(subjects.values()))
    measurer = TextMeasurer(texts, block_size, settings.batch_size, Store(output / "cells"))
    measured = {role: measurer.measure(subjects[role], tokenizers[role], role) for role in subjects}
    result = {
        **summarize(measured, measurer.names),
        "settings": dataclasses.asdict(settings) | {"block_size": block_size},
        "rates": {name: list(find_text_attack(name).rates) for name in settings.attacks},
        "documents": {
            "source": texts.source,
            "number": len(texts.documents),
            "words": int(measured["model"].clean.num_words.sum()),
            "bytes": int(measured["model"].clean.num_bytes.sum()),
        },
        "fingerprints": {role: subject.fingerprint for role, subject in subjects.items()},
        "versions": {
            "symphony_hf": __version__,
            "torch": torch.__version__,
            "transformers": transformers_version(),
            "python": platform.python_version(),
        },
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "result.json", result)
    return result
