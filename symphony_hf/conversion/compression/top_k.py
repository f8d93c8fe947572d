"""sweep_top_k: measure a model with fewer experts per token."""

import time
from pathlib import Path
from typing import Any

from symphony_hf.conversion.upcycling.target import writing
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.files import write_json
from symphony_hf.results import check_file_place

from .layers import open_model
from .rebuild import with_top_k
from .settings import TopKSettings
from .shrink import by_document, circumstances, level, parameters, ratio, read_texts, score

RESULT_FILE = "symphony-topk.json"


def sweep_top_k(settings: TopKSettings) -> dict[str, Any]:
    """Evaluate a model at smaller top-k, and optionally write the checkpoint of one of them.

    Returns:
        Content of the result file: for each top-k its perplexity with an interval, the ratio to the model's own with
        its verdict, active parameters, and scores by document.

    Raises:
        SymphonyError: If the model's top-k cannot be lowered, or the output exists.

    Source: Matryoshka MoE (arXiv 2509.26520) evaluates a model at each number of experts per token. Deviation: it also
    trains for that; here the model is used as it is.
    """
    started = time.perf_counter()
    target, result_file = settings.check_output(), Path(settings.result or RESULT_FILE).expanduser()
    if target is None:
        check_file_place(result_file, settings.command)
    opened = open_model(settings)
    own = opened.layers[0].top_k
    numbers = sorted(settings.top_k or range(1, own + 1))
    if numbers[-1] > own or (settings.keep or 1) > own:
        raise UnsupportedModelError(
            f"topk: the model selects {own} experts per token, so {max(numbers[-1], settings.keep or 1)} cannot be "
            f"measured: give at most {own}"
        )
    texts = read_texts(opened, settings)
    before = score(opened.model, texts, settings, f"top-{own}")
    result: dict[str, Any] = circumstances(opened, texts, settings) | {
        "experts": {"number": opened.layers[0].num_experts, "top_k": own},
        "rows": [],
    }
    for top_k in numbers:
        model = with_top_k(opened.model, opened.layers, top_k)
        scores = before if top_k == own else score(model, texts, settings, f"top-{top_k}")
        result["rows"].append(
            {
                "top_k": top_k,
                "perplexity": level(scores, settings),
                "ratio": ratio(scores, before, settings.seed),
                "parameters": parameters(model),
                "documents": by_document(scores),
            }
        )
    result["seconds"] = time.perf_counter() - started
    if target is None:
        write_json(result_file, result)
        return result
    result["kept"] = numbers[0] if settings.keep is None else settings.keep
    with writing(target, settings.command) as folder:
        with_top_k(opened.model, opened.layers, result["kept"]).save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
        write_json(settings.result_file(target, folder), result)
    return result
