"""The recipe runner: one path from a recipe to a trained, saved and measured model, for every launcher."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from ..config import SymphonyConfig
from ..data import BlockDataset, Corpus, Document, attack, cached_tokenizer, document_windows, load_corpus, pack_blocks
from ..errors import ConfigError
from ..evaluation import score_documents
from ..parsing import parse_settings
from ..patching import is_symphonized, symphonize
from .callback import SymphonyCallback
from .checkpoints import reporting_failed_save, write_json
from .launch import Ask, asks, check_launch, strategy_of, strategy_to_come
from .progress import StepProgress
from .trainer import ResumableTrainer, checkpoint_to_resume
from .zero import prepare_deepspeed

if TYPE_CHECKING:
    from ..recipe import EvalSection, ModelSection, Recipe


def run_recipe(recipe: "Recipe") -> dict[str, Any]:
    """Train what a recipe says, save it in `final/`, and measure it on clean and attacked text.

    With `resume_from_checkpoint` in the train section, training goes on from there as if it had not been interrupted.

    Args:
        recipe: From `load_recipe`. Under a launcher every process calls this.

    Returns:
        The results, as written to `results.json` in the output directory.

    Raises:
        SymphonyError: If the recipe, the data, the model or the checkpoint is not usable, before anything is trained;
            later, if something cannot be written.
    """
    output = Path(recipe.output.directory)
    arguments = training_arguments(recipe.train, output)
    asked = asks(recipe.launch, arguments)
    strategy = strategy_to_come(arguments)
    check_launch(asked, arguments.world_size, strategy)
    if strategy.startswith("zero"):
        prepare_deepspeed(arguments.device)
    checkpoint = checkpoint_to_resume(arguments)
    corpus = load_corpus(recipe.data.path, text_column=recipe.data.text_column)
    tokenizer = load_tokenizer(recipe, corpus)
    blocks = {
        split: BlockDataset(pack_blocks(getattr(corpus, split), tokenizer, recipe.data.block_size))
        for split in ("train", "validation")
    }
    torch.manual_seed(arguments.seed)
    model = load_model(recipe.model, tokenizer)
    _symphonize(model, recipe)
    if checkpoint is not None:
        _check_same_graphs(model, checkpoint)
    trainer = train(model, blocks["train"], blocks["validation"], arguments, resume_from=checkpoint, asked=asked)
    trainer.save_final(output / "final", tokenizer)
    results = {
        "recipe": dataclasses.asdict(recipe),
        "processes": arguments.world_size,
        "strategy": strategy_of(trainer.accelerator.state),
        "train": dict(trainer.state.log_history[-1]),
    }
    mean_loss = trainer.mean_loss()
    if mean_loss is not None:
        results["train"]["train_loss"] = mean_loss
    # On every process: where the weights are spread over them, each forward needs them all.
    results["test"] = evaluate_clean_and_attacked(trainer.model, tokenizer, corpus, recipe.data.block_size, recipe.eval)
    if trainer.is_world_process_zero():
        with reporting_failed_save(output / "results.json"):
            write_json(output / "results.json", results)
    return results


def _symphonize(model: PreTrainedModel, recipe: "Recipe") -> None:
    """Give the model the recipe's graph settings; a Symphony checkpoint brings its own, which must be the same.

    Raises:
        ConfigError: If the checkpoint's settings differ from the recipe's.
    """
    if not is_symphonized(model):
        if recipe.symphony is not None:
            symphonize(model, recipe.symphony)
        return
    stored = SymphonyConfig.from_dict(model.config.symphony)
    if recipe.symphony != stored:
        wanted = {} if recipe.symphony is None else recipe.symphony.to_dict()
        differing = [name for name, value in stored.to_dict().items() if wanted.get(name) != value]
        raise ConfigError(
            f"symphony: the checkpoint `{recipe.model.path}` was saved with other settings ({', '.join(differing)}): "
            "give the same ones, or start from its base model with `symphony.graph` set to the checkpoint's path"
        )


def _check_same_graphs(model: PreTrainedModel, checkpoint: Path) -> None:
    """Going on with other settings than a run began with would be neither run.

    Raises:
        ConfigError: If the settings of the checkpoint's graphs differ from the model's.
    """
    if not (checkpoint / "config.json").exists():
        return  # written in pieces, by FSDP
    stored = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("symphony")
    own = getattr(model.config, "symphony", None)
    before, now = ({} if values is None else SymphonyConfig.from_dict(values).to_dict() for values in (stored, own))
    differing = [name for name in SymphonyConfig().to_dict() if before.get(name) != now.get(name)]
    if differing:
        raise ConfigError(
            f"symphony: `{checkpoint}` was saved with other settings ({', '.join(differing)}): resume with the same "
            "ones, or start a new run in another output directory"
        )


def training_arguments(settings: dict[str, Any], output: Path) -> TrainingArguments:
    """TrainingArguments from a recipe's train section.

    Raises:
        ConfigError: If a setting is unknown, or TrainingArguments refuses a value.
    """
    # Trainer takes true for it, too, which TrainingArguments' type does not say.
    settings, resume_from = dict(settings), settings.get("resume_from_checkpoint")
    settings.pop("resume_from_checkpoint", None)
    arguments = parse_settings(TrainingArguments, settings, "train", output_dir=str(output), report_to="none")
    arguments.resume_from_checkpoint = resume_from
    return arguments


def load_tokenizer(recipe: "Recipe", corpus: Corpus) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; for a model built from a config, one trained on the corpus (and cached)."""
    if recipe.model.path is None:
        return cached_tokenizer(corpus, recipe.data.vocab_size)
    return AutoTokenizer.from_pretrained(recipe.model.path, revision=recipe.model.revision)


def load_model(section: "ModelSection", tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that a recipe names, or builds with random weights."""
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if section.path is not None:
        return AutoModelForCausalLM.from_pretrained(section.path, revision=section.revision, dtype=dtype)
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(section.config or {}),
    }
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype == "auto" else dtype)


def train(
    model: PreTrainedModel,
    train_data: Dataset[dict[str, torch.Tensor]],
    validation_data: Dataset[dict[str, torch.Tensor]] | None,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback] | None = None,
    resume_from: Path | None = None,
    asked: Sequence[Ask] = (),
) -> ResumableTrainer:
    """Train a model with transformers' Trainer; a Symphony model's graphs move once per optimizer step.

    Progress is one bar that shows the last values, where Trainer would print a dictionary at each.

    Args:
        resume_from: A whole checkpoint to go on from.
        asked: What must run, compared with what the Trainer made of it.

    Returns:
        The Trainer, after training.

    Raises:
        ConfigError: If something else runs than was asked for.
        CheckpointError: If a checkpoint cannot be written, or the one to go on from is of another model.
    """
    trainer = ResumableTrainer(
        model, arguments, train_dataset=train_data, eval_dataset=validation_data, callbacks=callbacks
    )
    check_launch(asked, trainer.accelerator.num_processes, strategy_of(trainer.accelerator.state))
    trainer.remove_callback(ProgressCallback)
    if not arguments.disable_tqdm:
        trainer.add_callback(StepProgress())
    if is_symphonized(model):
        # In front of the reporting callbacks, so that they see what it adds to the logs.
        trainer.callback_handler.callbacks.insert(0, SymphonyCallback())
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


def evaluate_clean_and_attacked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, block_size: int, section: "EvalSection"
) -> dict[str, Any]:
    """Perplexity on the test split, as it is and with words swapped.

    Returns:
        `clean` and `attacked` perplexity, their ratio, and how many documents and tokens they come from.
    """
    clean, attacked = clean_and_attacked_windows(corpus.test[: section.documents], tokenizer, block_size, section)
    scores = {
        name: score_documents(model, windows, progress=f"Scoring {name} text")
        for name, windows in (("clean", clean), ("attacked", attacked))
    }
    return {
        "clean": scores["clean"].perplexity,
        "attacked": scores["attacked"].perplexity,
        "ratio": scores["attacked"].perplexity / scores["clean"].perplexity,
        "documents": len(scores["clean"].names),
        "tokens": int(scores["clean"].num_tokens.sum()),
    }


def clean_and_attacked_windows(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, block_size: int, section: "EvalSection"
) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """The documents in windows of tokens, as they are and with words swapped, by document name."""
    attacked = attack(documents, rate=section.attack_rate, minimum=section.attack_minimum, seed=section.seed)
    names = [document.name for document in documents]
    clean_windows = dict(zip(names, document_windows(documents, tokenizer, block_size), strict=True))
    attacked_windows = dict(zip(names, document_windows(attacked, tokenizer, block_size), strict=True))
    # A document too short for one prediction has nothing to score, in either form.
    kept = [name for name in names if clean_windows[name] and attacked_windows[name]]
    return {name: clean_windows[name] for name in kept}, {name: attacked_windows[name] for name in kept}
