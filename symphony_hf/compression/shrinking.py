"""What merging and pruning share: open, calibrate, score, make smaller, write, score again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..evaluation import DocumentScores
from ..robustness.subject import Subject
from ..unfinished import write_json
from ..upcycling.target import writing
from .calibration import ExpertStatistics, calibrate
from .layers import check_number
from .measuring import Texts, by_document, circumstances, level, parameters, ratio, read_texts, score
from .opening import Opened, open_model
from .reducing import NewExpert, with_fewer_experts
from .settings import FewerExpertsSettings

Planner = Callable[[Opened, list[ExpertStatistics]], list[list[NewExpert]]]


@dataclass(frozen=True)
class _Shrunk:
    """The smaller model, and what is kept of the old one."""

    smaller: PreTrainedModel
    tokenizer: Any
    texts: Texts
    before: DocumentScores
    result: dict[str, Any]


def shrink(settings: FewerExpertsSettings, plan: Planner, *, outputs: bool, norms: bool) -> dict[str, Any]:
    """Make a checkpoint with fewer experts, load it by the Auto class, and measure that.

    Args:
        settings: Which, and how many.
        plan: Says of what the new experts of each layer are made.
        outputs: Whether it needs each expert's mean output.
        norms: Whether it needs the gate-weighted norms.

    Returns:
        What the result file holds.
    """
    started = time.perf_counter()
    target = settings.check_output()
    assert target is not None
    shrunk = _shrink(settings, plan, outputs, norms)  # the old model is gone when it returns
    result = shrunk.result
    with writing(target, settings.command) as folder:
        shrunk.smaller.save_pretrained(folder)
        shrunk.tokenizer.save_pretrained(folder)
        loaded = Subject(str(folder), None, "auto").model
        after = score(loaded, shrunk.texts, settings, "after")
        result["parameters"]["after"] = parameters(loaded)
        result["perplexity"]["after"] = level(after, settings)
        result["perplexity"]["ratio"] = ratio(after, shrunk.before, settings.seed)
        result["documents"]["after"] = by_document(after)
        result["seconds"] = time.perf_counter() - started
        write_json(settings.result_file(target, folder), result)
    return result


def _shrink(settings: FewerExpertsSettings, plan: Planner, outputs: bool, norms: bool) -> _Shrunk:
    opened = open_model(settings)
    check_number(opened.layers, settings.experts, settings.command)
    texts = read_texts(opened, settings, settings.calibration_tokens)
    seen = calibrate(
        opened.model,
        opened.layers,
        texts.calibration_NT,
        batch_size=settings.batch_size,
        outputs=outputs,
        norms=norms,
    )
    new_experts = plan(opened, seen)
    before = score(opened.model, texts, settings, "before")
    layer = opened.layers[0]
    result = circumstances(opened, texts, settings) | {
        "experts": {"before": layer.num_experts, "after": settings.experts, "top_k": layer.top_k},
        "made_of": {
            layer.router.name: [list(new.members) for new in own]
            for layer, own in zip(opened.layers, new_experts, strict=True)
        },
        "load_kept": [_load_kept(own, statistics) for own, statistics in zip(new_experts, seen, strict=True)],
        "parameters": {"before": parameters(opened.model)},
        "perplexity": {"before": level(before, settings)},
        "documents": {"before": by_document(before)},
    }
    smaller = with_fewer_experts(opened.model, opened.layers, new_experts)
    return _Shrunk(smaller, opened.tokenizer, texts, before, result)


def _load_kept(new_experts: list[NewExpert], statistics: ExpertStatistics) -> float:
    """The share of the calibration text's choices whose expert has a part in a new one."""
    members = [member for new in new_experts for member in new.members]
    return float(statistics.load[members].sum() / statistics.load.sum())
