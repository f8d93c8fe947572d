"""Checks of a study's recipe: a run supports a part of what recipes can say, and refuses the rest."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence

import torch
from transformers import AutoConfig

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import ConfigError, SymphonyError
from symphony_hf.recipe import ModelSection, Recipe

from .model import build_model
from .point import Point

WHERE = "ablation"
TOKENIZERS = ("words", "characters")
_MODEL_TYPE = "wikitext_moe"
_SCHEDULES = ("constant_with_warmup", "constant")
_HONOURED = (
    *("max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "lr_scheduler_type"),
    *("weight_decay", "max_grad_norm"),
)
_WITHOUT_EFFECT = ("logging_", "eval_", "save_", "per_device_eval_batch_size", "report_to", "use_cpu", "seed")
"""Prefixes of train settings without effect on a run's numbers; its seeds are the study's."""
_ROUTING = (
    *("strength", "smoothing", "normalization", "self_loops", "decay", "graph"),
    *("router_gradient", "num_neighbours"),
)
_PLAIN_FORM = {"router_type": "linear", "moe_every": 1, "momentum": None}
"""Model settings of SMoE; every other system changes one of them."""
_MODEL_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModelSection)
    if field.name not in ("config", "path", "revision")
}


def read_number(recipe: Recipe, name: str, default: float | None = None) -> float:
    """Return a finite number of the train section."""
    value = recipe.train.get(name, default)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{WHERE}: `{name}` of the recipe's train section must be a number, got {value!r}")
    return number


def check_recipe(recipe: Recipe) -> None:
    """Refuse settings that the plain training loop of a run does not support."""
    model_type = (recipe.model.config or {}).get("model_type")
    if recipe.model.path is not None or model_type != _MODEL_TYPE:
        raise ConfigError(
            f"{WHERE}: the recipe must build a `{_MODEL_TYPE}` model from a config, got "
            f"{recipe.model.path or model_type}: the systems are forms of that one"
        )
    if recipe.symphony is None or recipe.data.kind != "text" or recipe.data.tokenizer not in TOKENIZERS:
        raise ConfigError(
            f"{WHERE}: the recipe needs a `symphony` section, and data of kind `text` by `words` or `characters`"
        )
    for name in ("max_steps", "per_device_train_batch_size"):
        number = read_number(recipe, name)
        if number < 1 or number != int(number):
            raise ConfigError(f"{WHERE}: the recipe's train section needs a positive whole `{name}`, got {number:g}")
    if read_number(recipe, "learning_rate") <= 0:
        raise ConfigError(f"{WHERE}: the recipe's train section needs a positive `learning_rate`")
    if read_number(recipe, "warmup_steps", 0.0) < 0:
        raise ConfigError(f"{WHERE}: the recipe's `warmup_steps` must be 0 or more, or a share of the steps below 1")
    schedule = recipe.train.get("lr_scheduler_type", "linear")
    if schedule not in _SCHEDULES:
        raise ConfigError(
            f"{WHERE}: runs train with a constant rate after warm-up, as published; the recipe has "
            f"lr_scheduler_type {schedule}"
        )
    only = {
        "train.weight_decay": (read_number(recipe, "weight_decay", 0.0), 0.0),
        "train.max_grad_norm": (read_number(recipe, "max_grad_norm", 1.0), 0.0),  # 1 is Trainer's
        "eval.context": (recipe.eval.context, 0),
        "data.streaming": (recipe.data.streaming, False),
        "data.packing": (recipe.data.packing, False),
        "data.damage": (recipe.data.damage, None),  # the points have their own
        "peft": (recipe.peft, None),
        **{f"model.{name}": (getattr(recipe.model, name), default) for name, default in _MODEL_DEFAULTS.items()},
    }
    for name, (value, wanted) in only.items():
        if value != wanted:
            raise ConfigError(f"{WHERE}: `{name}` must be {wanted}, as in every run; the recipe has {value}")
    unknown = [name for name in recipe.train if name not in _HONOURED and not name.startswith(_WITHOUT_EFFECT)]
    if unknown:
        raise ConfigError(f"{WHERE}: runs support nothing of the recipe's train settings {', '.join(sorted(unknown))}")


def check_routing(recipe: Recipe, base: Point, points: Sequence[Point]) -> None:
    """Refuse recipe settings that the points of the study would silently override, or that would blur them."""
    assert recipe.symphony is not None
    assert recipe.model.config is not None
    weights = recipe.symphony.balance_loss_weight, recipe.symphony.z_loss_weight
    if max(weights) > 0 and (of_some := [point.layers for point in points if point.layers is not None]):
        raise ConfigError(
            f"{WHERE}: a point with `layers` {list(of_some[0])} has router losses in these layers alone, and the point "
            "it is compared with in all: set the recipe's balance_loss_weight and z_loss_weight to 0"
        )
    usual, routed = SymphonyConfig(), base.symphony(recipe.symphony)
    for name in _ROUTING:
        value = getattr(recipe.symphony, name)
        if value not in (getattr(usual, name), getattr(routed, name)):
            raise ConfigError(
                f"{WHERE}: the recipe has symphony.{name} {value}, which the points of a study decide: set it in "
                f"the study's `base`, `base: {{{name}: {value}}}`"
            )
    config = AutoConfig.for_model(**recipe.model.config)
    if config.num_experts_per_tok < 2:
        raise ConfigError(
            f"{WHERE}: the recipe's model has num_experts_per_tok {config.num_experts_per_tok}, so no two experts are "
            "chosen together, and the control of only as many experts as are chosen has one: take 2 or more"
        )
    for name, plain in _PLAIN_FORM.items():
        if getattr(config, name) != plain:
            raise ConfigError(
                f"{WHERE}: the recipe's model has {name} {getattr(config, name)}, which is a system of its own: take "
                "a recipe of SMoE, and name the systems in the study's `systems`"
            )


def check_points(recipe: Recipe, base: Point, points: Sequence[Point]) -> None:
    """Refuse points that the recipe's model cannot have, such as a graph in a layer without experts, before any run.

    Each is built without weights, on the meta device, which takes hundredths of a second.
    """
    checked: set[tuple[str, str, str, SymphonyConfig]] = set()
    for point in points:
        form = point.system, point.control, point.selection, point.symphony(recipe.symphony)
        if form in checked:  # points that differ in their training alone
            continue
        checked.add(form)
        try:
            with torch.device("meta"), _without_log():
                build_model(recipe, point, vocab_size=8)
        except SymphonyError as error:
            raise ConfigError(f"{WHERE}: the point `{point.label(base)}` cannot be run: {error}") from error


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Log no warnings: of a point without a graph, symphonize says each time that its strength is 0."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
