"""The settings that a run keeps when it is resumed, as the record of each checkpoint has them."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from symphony_hf.checkpoints.hub_names import hub_name
from symphony_hf.config import GRAPHS, SymphonyConfig
from symphony_hf.data.glue import is_embedded
from symphony_hf.data.text import OF_TABLES, may_read_tables
from symphony_hf.errors import ConfigError
from symphony_hf.files import ADAPTER_RECORD, CONFIG, read_object
from symphony_hf.recipe import DataSection, Recipe

from .trainer_checkpoints import read_record

_FIXED = ("seed", "data_seed", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm")
"""Training arguments that must be the same when a run is resumed."""

_FIXED_SINCE = (
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("completion_only_loss", "assistant_only_loss", "packing", "max_length", "chat_template_path"),
    *("packing_strategy", "truncation_mode", "shuffle_dataset", "loss_type"),
    *("train_sampling_strategy", "dataloader_drop_last", "label_smoothing_factor"),
)
"""Further ones, which the first releases did not record: the optimizer's, whose saved state has its own, those of
TRL's SFTTrainer that decide which tokens are trained, those of the order of rows, and of the loss."""

_BASE = ("model.path", "model.on_hub", "model.revision")
"""Where the weights that the run began from are, and whether that is a name on the Hub."""

_MODEL = (*_BASE, "model.trainable")
"""Settings of the model, which the first releases did not record."""

_SCHEDULE = ("max_steps", "num_train_epochs", "warmup_steps", "lr_scheduler_kwargs")
"""Training arguments that may change, for a longer run for example; the change is printed."""

_OF_TRAINED_TOKENIZER = {"data.vocab_size", "data.tokenizer"}
"""Settings that have no effect where the tokenizer is another model's. Earlier releases recorded them even so."""

_OF_TABLES = {f"data.{name}" for name in OF_TABLES}
"""Settings that have no effect where text has no table. Earlier releases recorded them even so."""

REVISION, TOKENIZER = "data_revision", "tokenizer_digest"
"""Keys of the data's revision and the trained tokenizer's digest in the settings of a checkpoint's record."""


def settings_of(recipe: Recipe, arguments: TrainingArguments) -> dict[str, Any]:
    """Return the settings that are compared when a run is resumed, except for those of the graphs."""
    sections = {"data": asdict(recipe.data), "peft": {} if recipe.peft is None else asdict(recipe.peft)}
    settings = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    without_effect: set[str] = set() if recipe.trains_tokenizer else _OF_TRAINED_TOKENIZER
    if recipe.data.kind == "text" and not may_read_tables(recipe.data):
        without_effect = without_effect | _OF_TABLES
    settings = {name: value for name, value in settings.items() if name not in without_effect}
    settings |= {name: getattr(arguments, name) for name in _FIXED}
    settings |= {name: getattr(arguments, name) for name in (*_FIXED_SINCE, *_SCHEDULE) if hasattr(arguments, name)}
    model, on_hub = recipe.model, hub_name(recipe.model.path) is not None
    base = (model.path, on_hub, (model.revision or "main") if on_hub else None)
    settings |= dict(zip(_MODEL, (*base, model.trainable), strict=True))
    return json.loads(json.dumps(settings, default=str))


def check_same_settings(settings: dict[str, Any], checkpoint: Path) -> list[str]:
    """Refuse to resume with other settings than the run began with.

    Returns:
        Notes on changes that are allowed: of the schedule; of the folder of a base model, which may have moved; of the
        name of its revision, to a commit; and of the base model itself if all parameters are trained.

    Raises:
        ConfigError: If the checkpoint records other settings. A checkpoint without a record is accepted.
    """
    before = (read_record(checkpoint) or {}).get("settings", settings)
    elsewhere = {"symphony", REVISION, TOKENIZER}  # compared by functions of their own
    elsewhere |= (_OF_TRAINED_TOKENIZER | _OF_TABLES) - settings.keys()
    if before.get(REVISION) is not None:
        elsewhere.add("data.revision")  # which may name the recorded commit, or the branch that had it
    since = (*_FIXED_SINCE, *_MODEL, *_SCHEDULE)
    before = {**{name: settings[name] for name in since if name in settings}, **before}
    on_hub = before.get("model.on_hub") and settings.get("model.on_hub")
    # Most of such a model is not trained, so that the base must be the same.
    is_kept = settings.get("model.trainable") is not None or any(name.startswith("peft.") for name in settings)
    noted = {*_SCHEDULE, *(() if on_hub and is_kept else _BASE)}
    if _is_commit(settings.get("model.revision")) and not _is_commit(before.get("model.revision")):
        noted.add("model.revision")  # the branch or tag may have had that commit
    names = [name for name in {**settings, **before} if name not in elsewhere]
    differing = [name for name in names if before.get(name) != settings.get(name)]
    refused = [name for name in differing if name not in noted]
    if refused:
        raise ConfigError(
            f"train: `{checkpoint}` is of a run with other settings ({_changes(refused, before, settings)}): resume "
            "with the same ones, or start a new run in another output directory"
        )
    notes = []
    if schedule := [name for name in differing if name in _SCHEDULE]:
        changes = _changes(schedule, before, settings)
        notes.append(f"it was saved with another schedule ({changes}): the learning rate now follows the new one")
    moved = [name for name in ("model.path", *(["model.revision"] if on_hub else [])) if name in differing]
    if moved:
        changes = _changes(moved, before, settings)
        notes.append(f"the run began from another place ({changes}): resume it only if the same model is there")
    return notes


def _is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _changes(names: list[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)


def check_same_data(revision: str | None, checkpoint: Path) -> None:
    """Refuse to resume on other data than the run began with.

    Raises:
        ConfigError: If the checkpoint records another revision. It is accepted if one of the two is unknown.
    """
    before = (read_record(checkpoint) or {}).get("settings", {}).get(REVISION)
    if None not in (before, revision) and before != revision:
        raise ConfigError(
            f"data: `{checkpoint}` is of a run on other data (revision {before}, now {revision}): restore it (from the "
            "Hub, by `data.revision`), or start a new run in another output directory"
        )


def check_same_tokenizer(digest: str | None, data: DataSection, checkpoint: Path) -> None:
    """Refuse to resume with another trained tokenizer than the run began with.

    Args:
        digest: Digest of the trained tokenizer; None if the tokenizer is another model's, which is not compared.
        data: Data section of the recipe.
        checkpoint: Checkpoint to resume from.

    Raises:
        ConfigError: If the checkpoint records another digest, or if it records none and the release that wrote it
            trained the tokenizer on another text. A checkpoint without recorded settings is accepted.
    """
    recorded = (read_record(checkpoint) or {}).get("settings")
    if recorded is None or digest is None:
        return
    anew = "start a new run in another output directory"
    if TOKENIZER not in recorded and data.kind != "text" and not is_embedded(data.kind, data.path):
        raise ConfigError(
            f"data: `{checkpoint}` is of a release that trained the tokenizer of `{data.kind}` data on the running "
            f"Python's library, not on the data: {anew}, or resume with the release that began this one"
        )
    if recorded.get(TOKENIZER, digest) != digest:
        raise ConfigError(
            f"data: `{checkpoint}` is of a run with another trained tokenizer (digest {recorded[TOKENIZER]}, now "
            f"{digest}): resume with the data and the release that it began with, or {anew}"
        )


def graph_settings(recipe: Recipe) -> dict[str, Any] | None:
    """Return the settings of the graphs that the model will have; None without graphs."""
    if recipe.symphony is None:
        return None
    follows_path = recipe.symphony.graph not in GRAPHS
    return (replace(recipe.symphony, graph="ema") if follows_path else recipe.symphony).to_dict()


def check_same_graphs(graphs: dict[str, Any] | None, checkpoint: Path) -> None:
    """Refuse to resume with other settings of the graphs than the run began with.

    Raises:
        ConfigError: If the checkpoint's settings differ, or cannot be read. A sharded checkpoint of a release that did
            not record them is accepted.
    """
    hint = "resume from another checkpoint, or start a new run in another output directory"
    recorded = (read_record(checkpoint) or {}).get("settings", {})
    written = next((checkpoint / name for name in (CONFIG, ADAPTER_RECORD) if (checkpoint / name).exists()), None)
    if written is not None:
        recorded = read_object(written, ConfigError, hint=hint)
    elif "symphony" not in recorded:
        return
    stored = recorded.get("symphony")
    before, now = ({} if values is None else SymphonyConfig.from_dict(values).to_dict() for values in (stored, graphs))
    differing = [name for name in SymphonyConfig().to_dict() if before.get(name) != now.get(name)]
    if differing:
        raise ConfigError(
            f"symphony: `{checkpoint}` was saved with other settings ({', '.join(differing)}): resume with the same "
            "ones, or start a new run in another output directory"
        )
