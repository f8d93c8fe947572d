"""`symphony check full-size`: make, load, run, save and reload the recipes' models at their true size.

Weights are seeded and random. Every stage is a process of its own, and its seconds and peak resident memory are
reported. That memory includes pages of mapped files, which the system reclaims when it needs them.

- make: the 7.4B model is upcycled from a dense checkpoint of Phi-3-mini's shapes; the 4.2B one combines that with a
  vision tower of CLIP ViT-L/14-336's shapes, and its projector is upcycled
- run: load, symphonize, move the graphs by one training forward, run one short sequence, save
- again: load once more and run the same sequence; the logits must be bitwise equal
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    PreTrainedModel,
)

from symphony_hf.conversion.upcycling.upcycle import upcycle
from symphony_hf.errors import ConfigError, EvaluationError, nearest
from symphony_hf.experiments.bench.gpu.shapes import CLIP_L_336, Inputs, random_batch
from symphony_hf.experiments.bench.results import number_cell, print_result, write_result
from symphony_hf.experiments.bench.upcycle import check_scratch, peak_memory, report, run_alone, write_random_phi3
from symphony_hf.models.llava import build_llava
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.symphonize import expert_graphs, symphonize
from symphony_hf.patching.upcycle_modules import upcycle_modules
from symphony_hf.results import check_file_place
from symphony_hf.settings import check_least
from symphony_hf.tables import Table

MODELS = ("7.4b", "4.2b")
_STAGES = ("make", "run", "again")
_MODEL, _SAVED, _LOGITS = "model", "saved", "logits.safetensors"


def run_full_size(
    model: str = "7.4b",
    folder: str | Path = ".",
    *,
    tokens: int = 32,
    shrink: int = 1,
    output: str | Path = "symphony-full-size.json",
) -> dict[str, Any]:
    """Make, run, save and load a model at full size, and write the measurements as JSON.

    Args:
        model: `7.4b` or `4.2b`.
        folder: Folder for the checkpoints, which are written to a temporary folder in it: 30 GB for the 7.4B model,
            18 GB for the 4.2B one.
        tokens: Text tokens of the sequence; an image adds 576.
        shrink: Divisor of all widths, heads and the vocabulary; 1 for the true shapes.
        output: Path of the JSON file.

    Returns:
        Parameters, bytes, and each stage's seconds and peak memory.

    Raises:
        ConfigError: If the model is unknown, `tokens` is below 1, or the folder does not exist.
        EvaluationError: If the logits of the two loads differ, or are not finite, or a stage fails.
    """
    check_file_place(output, "check full-size")
    if model not in MODELS:
        raise ConfigError(f"check full-size: unknown model `{model}`; {nearest(model, MODELS)}")
    check_least("check full-size", 1, tokens=tokens)
    check_scratch("check full-size", folder, shrink)
    with tempfile.TemporaryDirectory(prefix="symphony-full-size-", dir=folder) as scratch:
        settings = {"model": model, "scratch": scratch, "tokens": tokens, "shrink": shrink}
        bar = tqdm(_STAGES, desc=f"full size, {model}", unit=" stages", disable=None)
        arguments = json.dumps(settings)
        stages = {
            stage: run_alone("check full-size", "symphony_hf.experiments.full_size", stage, arguments) for stage in bar
        }
    values = {
        "model": model,
        "shrink": shrink,
        "tokens": stages["run"].pop("tokens"),
        "parameters": stages["run"].pop("parameters"),
        "dtype": "bfloat16",
        "largest_logit": stages["again"].pop("largest_logit"),
        "difference": stages["again"].pop("difference"),
        "stages": [{"stage": name, **measured} for name, measured in stages.items()],
    }
    result = write_result(output, values)
    if result["difference"] != 0:
        raise EvaluationError(f"check full-size: logits of the saved model differ by {result['difference']:.3g}")
    return result


class _Clock:
    """Measures the seconds of each step of a stage."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = step()
        self.steps.append({"step": name, "seconds": time.perf_counter() - started})
        return result


def _make(clock: _Clock, settings: dict[str, Any]) -> dict[str, Any]:
    scratch, shrink = Path(settings["scratch"]), settings["shrink"]
    dense, vision = scratch / "dense", scratch / "vision"
    clock("write random weights", lambda: write_random_phi3(dense, shrink))
    if settings["model"] == "7.4b":
        to: dict[str, Any] = {"to": "qwen2_moe", "layers": "every-other", "num_experts": 4, "top_k": 2, "check": False}
        clock("upcycle", lambda: upcycle(dense, scratch / _MODEL, **to))
    else:
        clock("write random vision", lambda: _write_random_vision(vision, shrink))
        llava = clock("put together", lambda: build_llava(str(dense), str(vision), 32000 // shrink))
        patterns = ["*multi_modal_projector"]
        clock("upcycle", lambda: upcycle_modules(llava, patterns, num_experts=4, top_k=2))
        clock("save", lambda: llava.save_pretrained(scratch / _MODEL))
        shutil.rmtree(vision)
    shutil.rmtree(dense)
    return {}


def _write_random_vision(folder: Path, shrink: int) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    config = AutoConfig.for_model(**{**CLIP_L_336, **{name: max(CLIP_L_336[name] // shrink, 1) for name in names}})
    torch.manual_seed(0)
    CLIPVisionModel._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _run(clock: _Clock, settings: dict[str, Any]) -> dict[str, Any]:
    scratch = Path(settings["scratch"])
    model = clock("load", lambda: _load(settings, scratch / _MODEL))
    clock("symphonize", lambda: symphonize(model, balance_loss_weight=0, z_loss_weight=0))
    batch = _batch(model, settings["tokens"])
    clock("move the graphs", lambda: _move_graphs(model, batch))
    logits = clock("forward", lambda: _logits(model, batch))
    clock("save", lambda: model.save_pretrained(scratch / _SAVED))
    save_file({"logits": logits, **_graphs(model)}, scratch / _LOGITS)
    size = sum(file.stat().st_size for file in (scratch / _SAVED).glob("*.safetensors"))
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "tokens": batch["input_ids"].shape[1], "bytes": size}


def _again(clock: _Clock, settings: dict[str, Any]) -> dict[str, Any]:
    scratch = Path(settings["scratch"])
    shutil.rmtree(scratch / _MODEL)
    model = clock("load", lambda: _load(settings, scratch / _SAVED))
    logits = clock("forward", lambda: _logits(model, _batch(model, settings["tokens"])))
    saved = load_file(scratch / _LOGITS)
    before = saved.pop("logits")
    graphs = _graphs(model)
    if list(graphs) != list(saved) or not all(torch.equal(graphs[name], saved[name]) for name in saved):
        raise EvaluationError("check full-size: the graphs changed when they were saved and loaded")
    if not logits.isfinite().all():
        raise EvaluationError("check full-size: the logits are not finite")
    return {"largest_logit": logits.abs().max().item(), "difference": (logits - before).abs().max().item()}


def _graphs(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(sorted(expert_graphs(model).items()))


def _load(settings: dict[str, Any], folder: Path) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM if settings["model"] == "7.4b" else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval()


def _batch(model: PreTrainedModel, tokens: int) -> dict[str, Tensor]:
    batch = random_batch(model, Inputs(1, tokens))
    del batch["labels"]
    return batch


def _move_graphs(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Run one forward in training mode, and commit its counts to the graphs.

    The weights are frozen, so that it counts without a backward pass, for which a full-size model has no memory.
    """
    before = {name: graph.clone() for name, graph in _graphs(model).items()}
    model.train().requires_grad_(False)
    model(**batch, use_cache=False)
    update_graphs(model)
    model.eval()
    if any(torch.equal(graph, before[name]) for name, graph in _graphs(model).items()):
        raise EvaluationError("check full-size: a graph did not move")


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits.float()


def print_full_size(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the seconds and memory of the stages, and the path of the file."""
    rows = []
    for stage in result["stages"]:
        for number, step in enumerate(stage["steps"]):
            memory = "" if number else number_cell(stage["peak_memory_bytes"] / 1e9, ".2f", " GB")
            name = "" if number else stage["stage"]
            rows.append([name, step["step"], number_cell(step["seconds"], ".1f"), memory])
    title = f"{result['model']}: {result['parameters']:,} parameters, bfloat16, a sequence of {result['tokens']} tokens"
    caption = "The logits of the saved and reloaded model are bitwise equal."
    header = ["stage", "step", "seconds", "peak memory"]
    print_result(result, [Table(title, header, rows, caption=caption)], console)


def _measure() -> dict[str, Any]:
    stage, settings = sys.argv[1], json.loads(sys.argv[2])
    clock = _Clock()
    values = {"make": _make, "run": _run, "again": _again}[stage](clock, settings)
    return {**values, "steps": clock.steps, "peak_memory_bytes": peak_memory()}


if __name__ == "__main__":
    report(_measure)
