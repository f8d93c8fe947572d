"""`symphony quickstart`: from pre-training to a comparison on real text, in minutes, on a CPU.

The model of `quickstart.yaml` is pre-trained on the running Python's library sources, without a graph. Two copies are
then fine-tuned on the same batches with the same budget: `plain`, with strength 0, which routes as the base model does,
and `symphony`. Both are evaluated on held-out text, clean and attacked.
"""

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils.logging import disable_progress_bar

from symphony_hf.compat import versions
from symphony_hf.data.blocks import BlockDataset, pack_blocks
from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.documents import Corpus
from symphony_hf.data.rows import thinned
from symphony_hf.data.tokenizer import cached_tokenizer
from symphony_hf.errors import DataError
from symphony_hf.evaluation.attacks.word_swap import attack, words_changed
from symphony_hf.evaluation.clean_attacked import clean_and_attacked_windows
from symphony_hf.evaluation.comparison import compare_perplexity, compare_robustness, perplexity_interval
from symphony_hf.evaluation.perplexity import DocumentScores, score_documents
from symphony_hf.evaluation.report.quickstart import write_report
from symphony_hf.evaluation.routing.records import RoutingStability, routing_stability
from symphony_hf.evaluation.statistics import MIN_DOCUMENTS
from symphony_hf.files import write_json
from symphony_hf.patching.symphonize import expert_graphs, unsymphonize
from symphony_hf.recipe import EvalSection, Recipe, load_recipe
from symphony_hf.results import check_results, remove_results

from .arguments import training_arguments
from .fit import train
from .models import add_graph, load_model
from .output_lock import only_run_in
from .quickstart_checks import compare_saved_forms, refuse_differences
from .quickstart_settings import RECIPE, QuickstartSettings

ARMS = ("plain", "symphony")
FINE_TUNE_LEARNING_RATE = 1e-3
FINE_TUNE_SHARE = 5
"""One training document in this many is kept for fine-tuning."""


@dataclass(frozen=True)
class Arm:
    """Measurements of one of the two copies."""

    clean: DocumentScores
    attacked: DocumentScores
    routing: RoutingStability
    seconds_per_step: float
    curves: dict[str, list[tuple[float, float]]]


def run_quickstart(settings: QuickstartSettings) -> dict[str, Any]:
    """Run the quickstart, and write `report.md`, `report.json`, pictures and checkpoints to the output folder.

    Returns the values of `report.json`. Raises SymphonyError if there is too little text, if another run is writing to
    the folder, or, once all is written, if a saved checkpoint does not compute what the model does.
    """
    output = Path(settings.output)
    check_results(output / "report.json", ["report.md"], "quickstart")
    with only_run_in(output, "quickstart"):
        return _run(settings, output)


def _run(settings: QuickstartSettings, output: Path) -> dict[str, Any]:
    started = time.perf_counter()
    # Progress bars for milliseconds of work would bury those for minutes of it.
    disable_progress_bar()
    corpus = load_corpus(settings.data)
    tokenizer = cached_tokenizer(corpus, settings.vocab_size)
    base_blocks, tune_blocks, validation_blocks = _blocks(settings, corpus, tokenizer)
    windows = clean_and_attacked_windows(
        thinned(corpus.test, settings.documents),
        tokenizer,
        settings.block_size,
        EvalSection(attack_rate=settings.attack_rate, seed=settings.seed),
    )
    if len(windows[0]) < MIN_DOCUMENTS:
        raise DataError(
            f"quickstart: {corpus.source} has {len(windows[0])} held-out documents to evaluate on, and intervals need "
            f"{MIN_DOCUMENTS}: raise `documents`, or give more text"
        )
    remove_results(output / "report.json", ["report.md"])
    _say(f"Pre-training a small OLMoE-shaped model on {corpus.source}")
    base_curves, base_seconds = _pretrain(settings, tokenizer, base_blocks, validation_blocks, output / "base")
    arms, checks, graphs = {}, {}, {}
    for name in ARMS:
        _say(f"Fine-tuning the {name} copy")
        model, curves, seconds = _fine_tune(settings, name, tune_blocks, validation_blocks, output)
        clean, attacked = (
            score_documents(model, texts, progress=f"Scoring the {name} copy, {kind}")
            for kind, texts in zip(("clean", "attacked"), windows, strict=True)
        )
        kept = routing_stability(model, *windows, progress=f"Routing of the {name} copy")
        arms[name] = Arm(clean, attacked, kept, seconds, curves)
        if name == "plain":
            unsymphonize(model)
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        if name == "symphony":
            graphs = expert_graphs(model)
            checks = compare_saved_forms(model, windows[0], output, _model_config()["num_experts_per_tok"])
    report = _report(settings, corpus, arms, checks, len(base_blocks), len(tune_blocks))
    report |= {
        "stock_seconds_per_step": base_seconds,
        "words_changed": _share_of_words_changed(settings, corpus),
        "curves": {"base": base_curves, **{name: arm.curves for name, arm in arms.items()}},
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "report.json", report)
    write_report(report, graphs, report["curves"], output)
    refuse_differences(checks)
    return report


def _share_of_words_changed(settings: QuickstartSettings, corpus: Corpus) -> float:
    documents = thinned(corpus.test, settings.documents)
    attacked = attack(documents, rate=settings.attack_rate, seed=settings.seed)
    changed = sum(words_changed(a.text, b.text) for a, b in zip(documents, attacked, strict=True))
    return changed / sum(len(document.text.split()) for document in documents)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _blocks(settings: QuickstartSettings, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Return the tokens of the pre-training documents, the fine-tuning documents, and the validation split."""
    tune = corpus.train[::FINE_TUNE_SHARE]
    names = {document.name for document in tune}
    base = [document for document in corpus.train if document.name not in names]
    return [pack_blocks(documents, tokenizer, settings.block_size) for documents in (base, tune, corpus.validation)]


def _pretrain(
    settings: QuickstartSettings,
    tokenizer: PreTrainedTokenizerBase,
    blocks: torch.Tensor,
    validation: torch.Tensor,
    output: Path,
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Train the recipe's model without a graph, with its family's own balance loss."""
    set_seed(settings.seed)
    changes = settings.overrides(output, settings.pretrain_steps)
    recipe = load_recipe(RECIPE, {**changes, "model.config": {**_model_config(), "output_router_logits": True}})
    model = load_model(recipe, tokenizer)
    curves, seconds = _train(model, recipe, blocks, validation)
    model.config.output_router_logits = False
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return curves, seconds


def _fine_tune(
    settings: QuickstartSettings, name: str, blocks: torch.Tensor, validation: torch.Tensor, output: Path
) -> tuple[PreTrainedModel, dict[str, list[tuple[float, float]]], float]:
    """Fine-tune a copy. Initial weights, batches, losses and budget are the same; only the strength differs."""
    set_seed(settings.seed)
    changes = settings.overrides(output / name, settings.finetune_steps) | {"learning_rate": FINE_TUNE_LEARNING_RATE}
    recipe = load_recipe(RECIPE, changes | ({"symphony.strength": 0.0} if name == "plain" else {}))
    model = AutoModelForCausalLM.from_pretrained(output / "base")
    add_graph(model, recipe)
    return model, *_train(model, recipe, blocks, validation)


def _train(
    model: PreTrainedModel, recipe: Recipe, blocks: torch.Tensor, validation: torch.Tensor
) -> tuple[dict[str, list[tuple[float, float]]], float]:
    timer, arguments = _StepTimer(), training_arguments(recipe)
    arguments._n_gpu = min(1, arguments.n_gpu)  # on several, Trainer would train other batches, by DataParallel
    trainer = train(model, BlockDataset(blocks), BlockDataset(_sample(validation)), arguments, [timer])
    return _curves(trainer.state.log_history), timer.median()


def _model_config() -> dict[str, Any]:
    config = load_recipe(RECIPE).model.config
    assert config is not None
    return config


def _sample(blocks: torch.Tensor, most: int = 64) -> torch.Tensor:
    """Return evenly spaced validation blocks, enough for a curve."""
    return blocks[:: max(1, len(blocks) // most)][:most]


def _curves(history: list[dict[str, float]]) -> dict[str, list[tuple[float, float]]]:
    return {
        curve: [(entry["step"], entry[key]) for entry in history if key in entry]
        for curve, key in (("train", "loss"), ("eval", "eval_loss"))
    }


class _StepTimer(TrainerCallback):
    """Callback that measures the seconds of each optimizer step, without evaluations."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        return float(torch.tensor(self.seconds).median())


def _report(
    settings: QuickstartSettings,
    corpus: Corpus,
    arms: dict[str, Arm],
    checks: dict[str, float | bool],
    base_blocks: int,
    tune_blocks: int,
) -> dict[str, Any]:
    plain, symphony = arms["plain"], arms["symphony"]
    seed = settings.seed
    comparisons = {
        "clean": compare_perplexity(symphony.clean, plain.clean, seed=seed).exp(),
        "attacked": compare_perplexity(symphony.attacked, plain.attacked, seed=seed).exp(),
        "attacked_to_clean": compare_robustness(
            symphony.clean, symphony.attacked, plain.clean, plain.attacked, seed=seed
        ),
    }
    return {
        "command": settings.command_line(),
        "settings": dataclasses.asdict(settings),
        "model": _model_config(),
        "corpus": {"source": corpus.source, "pretrain_blocks": base_blocks, "finetune_blocks": tune_blocks},
        "documents": len(plain.clean.names),
        "tokens": int(plain.clean.num_tokens.sum()),
        "arms": {name: _arm_values(arm, seed) for name, arm in arms.items()},
        "comparisons": {
            name: {**dataclasses.asdict(interval), "verdict": interval.verdict()}
            for name, interval in comparisons.items()
        },
        "checks": checks,
        "versions": {**versions(), "machine": platform.machine(), "threads": torch.get_num_threads()},
    }


def _arm_values(arm: Arm, seed: int) -> dict[str, Any]:
    return {
        "clean": dataclasses.asdict(perplexity_interval(arm.clean, seed=seed)),
        "attacked": dataclasses.asdict(perplexity_interval(arm.attacked, seed=seed)),
        "ratio": arm.attacked.perplexity / arm.clean.perplexity,
        "routing_kept": arm.routing.share,
        "routing_kept_tokens": arm.routing.num_tokens,
        "seconds_per_step": arm.seconds_per_step,
    }
