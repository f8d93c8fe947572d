"""The recipe runner: trains, saves and evaluates the model of a recipe, under every launcher."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from symphony_hf.checkpoints.model_card import PICTURE as CARD_PICTURE
from symphony_hf.checkpoints.model_card import is_card_alone
from symphony_hf.checkpoints.upload import write_card
from symphony_hf.data.packing import check_packing
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.streams import EndlessStream
from symphony_hf.data.tokenizer import digest_tokenizer
from symphony_hf.errors import ConfigError, SymphonyWarning
from symphony_hf.files import write_json
from symphony_hf.recipe import Recipe
from symphony_hf.results import check_results, remove_results

from .arguments import packed_rows, training_arguments
from .damage import DamageEpochs, damage_of, damaged
from .final_evaluation import measure
from .fit import train
from .launch import Request, check_launch, check_one_gpu, expected_strategy, is_launched, requests_of
from .models import add_adapters, add_graph, choose_trained, load_model
from .output_lock import only_run_in
from .processors import load_processor, tokenizer_notes
from .report import REPORT, describe_run, write_run_report
from .resumed_settings import (
    REVISION,
    TOKENIZER,
    check_same_data,
    check_same_graphs,
    check_same_settings,
    check_same_tokenizer,
    graph_settings,
    settings_of,
)
from .resuming import checkpoint_to_resume, print_notes
from .routing_monitor import monitors_of
from .trainer_checkpoints import read_record, reporting_failed_save
from .zero import gather_when_saving, prepare_deepspeed, set_aside_empty_parameters

RESULTS = "results.json"


def run_recipe(recipe: Recipe, command: str = "") -> dict[str, Any]:
    """Train the model of a recipe, save it to `final/`, evaluate it, and write a report.

    With `resume_from_checkpoint` in the train section, training resumes as if it had not been interrupted. Under a
    launcher, every process calls this.

    Args:
        recipe: Recipe, from `load_recipe`.
        command: Command that runs it again, for the report.

    Returns:
        Results, as written to `results.json` in the output directory. `report.md` is next to it, and `final/` has a
        model card, ready to be pushed.

    Raises:
        SymphonyError: Before training, if the recipe, the data, the model or the checkpoint is not usable, or another
            run is writing to the output directory; later, if a file cannot be written.
    """
    began, output = time.perf_counter(), Path(recipe.output.directory)
    arguments, requested = prepare_run(recipe)
    with only_run_in(output, "train", arguments):
        return _run(recipe, arguments, requested, command, began)


def _run(
    recipe: Recipe, arguments: TrainingArguments, requested: list[Request], command: str, began: float
) -> dict[str, Any]:
    output = Path(recipe.output.directory)
    settings, graphs = settings_of(recipe, arguments), graph_settings(recipe)
    print_notes(arguments, tokenizer_notes(recipe))
    checkpoint = checkpoint_to_resume(arguments)
    started: float | None = began
    if checkpoint is not None:
        print_notes(arguments, check_same_settings(settings, checkpoint))
        check_same_graphs(graphs, checkpoint)
        seconds_before = (read_record(checkpoint) or {}).get("seconds")
        started = None if seconds_before is None else began - seconds_before
    with arguments.main_process_first(desc="reading the data"):  # the other processes find it in the cache
        processor = load_processor(recipe)
        tokenizer = getattr(processor, "tokenizer", processor)
        digest = digest_tokenizer(tokenizer) if recipe.trains_tokenizer else None
        data = prepare_data(recipe.data, processor, seed=arguments.seed, train=recipe.train)
    if checkpoint is not None:
        check_same_data(data.revision, checkpoint)
        check_same_tokenizer(digest, recipe.data, checkpoint)
    callbacks: list[TrainerCallback] = []
    if (damage := damage_of(recipe)) is not None:
        data = damaged(data, damage, processor, arguments.seed)
        callbacks.append(DamageEpochs(data.train))
    if data.validation is None and arguments.eval_strategy.value != "no":
        raise ConfigError(
            f"train: eval_strategy `{arguments.eval_strategy.value}` needs a validation split, and "
            f"`{recipe.data.path}` has none: add one, or set `eval_strategy: no`"
        )
    torch.manual_seed(arguments.seed)
    model = load_model(recipe, tokenizer)
    if expected_strategy(arguments) == "zero3":
        set_aside_empty_parameters(model)
    add_graph(model, recipe)
    if recipe.data.packing:
        _check_packing(model, recipe, arguments)
    choose_trained(model, recipe.model.trainable)
    model = add_adapters(model, recipe.peft)
    trainer = train(
        model,
        EndlessStream(data.train) if recipe.data.streaming else data.train,
        data.validation,
        arguments,
        [*callbacks, *monitors_of(model)],
        checkpoint,
        requested,
        data.collator,
        processor,
        {**settings, "symphony": graphs, REVISION: data.revision, TOKENIZER: digest},
        started,
    )
    if trainer.is_world_process_zero():
        with reporting_failed_save(output / RESULTS):
            remove_results(output / RESULTS, [REPORT])
            _remove_card(output / "final")
    trainer.save_final(output / "final", processor)
    results = describe_run(recipe, trainer, data, command)
    # On every process: with partitioned weights, each forward needs them all.
    results["test"] = measure(recipe, trainer, processor, data)
    results["seconds"] = time.perf_counter() - (began if started is None else started)
    if started is None:  # the run began under a release that did not record it
        results["seconds_since_step"] = trainer.resumed_at
    if trainer.is_world_process_zero():
        with reporting_failed_save(output / RESULTS):
            write_json(output / RESULTS, results)
            write_run_report(results, output)
            if recipe.symphony is not None:
                write_card(output / "final", output.name)
    return results


def prepare_run(recipe: Recipe) -> tuple[TrainingArguments, list[Request]]:
    """Return the training arguments and the requested launch; refuse what can be refused before anything is loaded.

    Raises:
        ConfigError: If a setting is unknown or refused, a package or a device is missing, another launch runs than was
            requested, this process sees several GPUs, or the output directory has files that would be overwritten.
    """
    check_results(Path(recipe.output.directory) / RESULTS, [REPORT], "train")
    arguments = training_arguments(recipe)
    check_one_gpu(arguments)
    requested = requests_of(recipe.launch, arguments)
    strategy = expected_strategy(arguments)
    _check_partitioning(recipe, strategy)
    check_launch(requested, arguments.world_size, strategy)
    if strategy.startswith("zero"):
        prepare_deepspeed(arguments.device)
    if strategy == "zero3":
        gather_when_saving(arguments.deepspeed_plugin)
    return arguments, requested


def prepare_dry_run(recipe: Recipe) -> tuple[TrainingArguments, list[str]]:
    """Make the training arguments of a dry run, on any machine.

    Returns:
        Training arguments, and what could not be checked here.

    Raises:
        ConfigError: If a setting is unknown or refused, the launch under way is not the one that was requested, or the
            output directory has files that would be overwritten.
    """
    check_results(Path(recipe.output.directory) / RESULTS, [REPORT], "train")
    not_checked: list[str] = []
    arguments = training_arguments(recipe, not_checked)
    for strategy in (recipe.launch.strategy, expected_strategy(arguments)):
        _check_partitioning(recipe, strategy)
    try:
        check_launch(requests_of(recipe.launch, arguments), arguments.world_size, expected_strategy(arguments))
    except ConfigError:
        if is_launched():
            raise
        asked = recipe.launch
        not_checked.append(f"launch: processes {asked.processes or 'any'}, strategy {asked.strategy or 'any'}")
    if arguments.n_gpu > 1:
        not_checked.append(f"launch: one process for each of the {arguments.n_gpu} GPUs here, or one GPU")
    return arguments, not_checked


def _check_packing(model: PreTrainedModel, recipe: Recipe, arguments: TrainingArguments) -> None:
    if expected_strategy(arguments) != "zero3":
        has_several = any(number > 1 for number in packed_rows(recipe, arguments).values())
        check_packing(model, recipe.model.attention, rows=2 if has_several else 1)
    elif arguments.process_index == 0:
        warnings.warn(
            f"data: packing: under ZeRO-3, which partitions weights, it is not checked that {type(model).__name__} "
            "keeps packed documents apart: check a small model of its family by symphony_hf.data.check_packing",
            SymphonyWarning,
            stacklevel=2,
        )


def _check_partitioning(recipe: Recipe, strategy: str | None) -> None:
    if recipe.model.quantization is not None and strategy in ("zero3", "fsdp"):
        raise ConfigError("model: 4-bit weights cannot be partitioned over processes: use `ddp` or `zero2`")


def _remove_card(final: Path) -> None:
    """Remove the model card of an earlier run's model, with its results, unless somebody has added text to it."""
    readme = final / "README.md"
    if readme.is_file() and is_card_alone(readme.read_text(encoding="utf-8")):
        readme.unlink()
        (final / CARD_PICTURE).unlink(missing_ok=True)
