"""A study: the YAML file that sets a recipe, the points to run it at, and the seeds."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import ConfigError
from symphony_hf.recipe import ModelSection, Recipe, load_recipe
from symphony_hf.settings import check_names, parse_settings

from .point import SYSTEMS, Point

_MODEL_TYPE = "wikitext_moe"
_SCHEDULES = ("constant_with_warmup", "constant")
_WHERE = "ablation"
_HONOURED = (
    *("max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "lr_scheduler_type"),
    *("weight_decay", "max_grad_norm"),
)
_WITHOUT_EFFECT = ("logging_", "eval_", "save_", "per_device_eval_batch_size", "report_to", "use_cpu", "seed")
"""Prefixes of train settings without effect on a run's numbers; its seeds are the study's."""
_ROUTING = ("strength", "smoothing", "normalization", "self_loops", "decay", "graph")
_PLAIN_FORM = {"router_type": "linear", "moe_every": 1, "momentum": None}
"""Model settings of SMoE; every other system changes one of them."""
_MODEL_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModelSection)
    if field.name not in ("config", "path", "revision")
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """An ablation study.

    Args:
        recipe: Model, text, training and attack of every run; a pre-training recipe of `wikitext_moe`.
        base: Base point of the grid.
        systems: Systems to run at the base point and without a graph.
        axes: Values of each setting to try at the base point. A value that is a mapping sets those settings instead.
        seeds: Seeds of weights, batches and dropout. Runs of the same seed are compared in pairs.
        product: Whether to run all combinations of the axes' values instead of one change at a time. Combinations
            that `SymphonyConfig` refuses are left out.
        command: Command of the study, for the report, without the path of its text.
    """

    recipe: Recipe
    base: Point = field(default_factory=Point)
    systems: tuple[str, ...] = ("smoe",)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    product: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for system in self.systems:
            if system not in SYSTEMS:
                raise ConfigError(f"{_WHERE}: `systems` has {system!r}; known are {', '.join(SYSTEMS)}")
        if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in self.seeds):
            raise ConfigError(f"{_WHERE}: `seeds` must be whole numbers; got {list(self.seeds)}")
        if not isinstance(self.product, bool):
            raise ConfigError(f"{_WHERE}: `product` must be true or false; got {self.product!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"{_WHERE}: `seeds` must be one or more, each once; got {list(self.seeds)}")
        if self.axes and self.base.is_plain:
            raise ConfigError(f"{_WHERE}: the base point has no graph that the axes could change: give it one")
        _check_recipe(self.recipe)
        _check_routing(self.recipe, self.base)

    @property
    def steps(self) -> int:
        """Number of optimizer steps of a run."""
        return int(_number(self.recipe, "max_steps"))

    @property
    def batch_size(self) -> int:
        """Batch size."""
        return int(_number(self.recipe, "per_device_train_batch_size"))

    @property
    def learning_rate(self) -> float:
        """Learning rate after the warm-up."""
        return _number(self.recipe, "learning_rate")

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps; the recipe may give a share of all steps."""
        value = _number(self.recipe, "warmup_steps", 0.0)
        if self.recipe.train.get("lr_scheduler_type") == "constant":
            return 0  # as Trainer has it
        return math.ceil(value * self.steps) if value < 1 else int(value)

    @property
    def tokens(self) -> int:
        """Number of training tokens of a run."""
        return self.steps * self.batch_size * self.recipe.data.block_size

    def points(self) -> list[Point]:
        """Return all distinct points: the systems without and with a graph, then the axes' values."""
        points = [point for system in self.systems for point in self._pair(system)]
        changed = [_changed(self.base, change) for change in self._changes() if not _refusal(self.base, change)]
        # Each is compared with its system without a graph.
        points += [point for one in changed for point in ([one] if one.system in self.systems else [one.plain, one])]
        return list(dict.fromkeys(point.canonical() for point in points))

    def left_out(self) -> list[str]:
        """Return the combinations that are refused, and why."""
        refusals = [(change, _refusal(self.base, change)) for change in self._changes()]
        return [f"{_named(change)}: {why}" for change, why in refusals if why is not None]

    def _pair(self, system: str) -> list[Point]:
        point = _changed(self.base, {"system": system})
        return [point.plain, point]

    def _changes(self) -> list[dict[str, Any]]:
        choices = [[_change(name, value) for value in values] for name, values in self.axes.items()]
        if not self.product:
            return [change for axis in choices for change in axis]
        combined: list[dict[str, Any]] = [{}]
        for axis in choices:
            combined = [before | change for before in combined for change in axis]
        return combined if choices else []


def load_study(path: str | Path, overrides: dict[str, Any] | None = None) -> Study:
    """Read a study.

    Args:
        path: Path of the YAML file. Its `recipe` is relative to it; its `overrides` change settings of that recipe, by
            `section.name`, or by name in the train section.
        overrides: Further overrides, which take precedence.

    Raises:
        ConfigError: If a file cannot be read, or a setting or a value is unknown.
    """
    path = Path(path)
    where = f"study `{path}`"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is no YAML: {error}") from error
    known = ("recipe", "overrides", "base", "systems", "axes", "seeds", "product")
    values = check_names(values, known, where)
    if not isinstance(values.get("recipe"), str):
        raise ConfigError(f"{where}: `recipe` must be the path of a recipe, from the study's folder")
    settings = check_names(values.pop("overrides", None) or {}, None, f"{where}: overrides")
    recipe = load_recipe(path.parent / values.pop("recipe"), {**settings, **(overrides or {})})
    base = parse_settings(Point, values.pop("base", None) or {}, f"{where}: base")
    axes = check_names(values.pop("axes", None) or {}, None, f"{where}: axes")
    for name, choices in axes.items():
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: axis `{name}` must be a list of values, got {choices!r}")
        for choice in choices:
            parse_settings(Point, _change(name, choice), f"{where}: axis `{name}`")
    for name in ("systems", "seeds"):
        if name in values:
            if not isinstance(values[name], list):
                raise ConfigError(f"{where}: `{name}` must be a list, got {values[name]!r}")
            values[name] = tuple(values[name])
    command = _command(path, overrides or {})
    return Study(recipe=recipe, base=base, axes=axes, command=command, **values)


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--set NAME=VALUE` by name, read as YAML."""
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"symphony ablate: --set takes NAME=VALUE, got {text!r}")
    return {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in texts)}


def _command(path: Path, overrides: dict[str, Any]) -> str:
    shown = {name: "TEXT" if name == "data.path" else value for name, value in overrides.items()}
    changes = [word for name, value in shown.items() for word in ("--set", f"{name}={_yaml(value)}")]
    return shlex.join(["symphony", "ablate", str(path), "--output", "DIR", *changes])


def _yaml(value: Any) -> str:
    """Format a value on one line of YAML."""
    is_word = isinstance(value, str) and yaml.safe_load(value) == value
    return value if is_word else json.dumps(value)


def _change(axis: str, value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {axis: value}


def _named(change: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in change.items())


def _refusal(point: Point, change: dict[str, Any]) -> str | None:
    """Return why a combination of changes is refused; None if it is valid."""
    try:
        _changed(point, change)
    except ConfigError as error:
        return str(error)
    return None


def _changed(point: Point, change: dict[str, Any]) -> Point:
    return parse_settings(Point, {**dataclasses.asdict(point), **change}, _WHERE)


def _number(recipe: Recipe, name: str, default: float | None = None) -> float:
    """Return a number of the train section; YAML reads `1e-3` as text."""
    value = recipe.train.get(name, default)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{_WHERE}: `{name}` of the recipe's train section must be a number, got {value!r}"
        ) from error


def _check_recipe(recipe: Recipe) -> None:
    """Refuse settings that the plain training loop of a run does not support."""
    model_type = (recipe.model.config or {}).get("model_type")
    if recipe.model.path is not None or model_type != _MODEL_TYPE:
        raise ConfigError(
            f"{_WHERE}: the recipe must build a `{_MODEL_TYPE}` model from a config, got "
            f"{recipe.model.path or model_type}: the systems are forms of that one"
        )
    if recipe.symphony is None or recipe.data.kind != "text" or recipe.data.tokenizer != "words":
        raise ConfigError(f"{_WHERE}: the recipe needs a `symphony` section, and data of kind `text` by `words`")
    for name in ("max_steps", "per_device_train_batch_size", "learning_rate"):
        if not _number(recipe, name) > 0:
            raise ConfigError(f"{_WHERE}: the recipe's train section needs a positive `{name}`")
    schedule = recipe.train.get("lr_scheduler_type", "linear")
    if schedule not in _SCHEDULES:
        raise ConfigError(
            f"{_WHERE}: runs train with a constant rate after warm-up, as published; the recipe has "
            f"lr_scheduler_type {schedule}"
        )
    only = {
        "train.weight_decay": (_number(recipe, "weight_decay", 0.0), 0.0),
        "train.max_grad_norm": (_number(recipe, "max_grad_norm", 1.0), 0.0),  # 1 is Trainer's
        "eval.context": (recipe.eval.context, 0),
        "data.streaming": (recipe.data.streaming, False),
        "data.packing": (recipe.data.packing, False),
        "peft": (recipe.peft, None),
        **{f"model.{name}": (getattr(recipe.model, name), default) for name, default in _MODEL_DEFAULTS.items()},
    }
    for name, (value, wanted) in only.items():
        if value != wanted:
            raise ConfigError(f"{_WHERE}: `{name}` must be {wanted}, as in every run; the recipe has {value}")
    unknown = [name for name in recipe.train if name not in _HONOURED and not name.startswith(_WITHOUT_EFFECT)]
    if unknown:
        raise ConfigError(f"{_WHERE}: runs support nothing of the recipe's train settings {', '.join(sorted(unknown))}")


def _check_routing(recipe: Recipe, base: Point) -> None:
    """Refuse recipe settings that the points of the study would silently override."""
    assert recipe.symphony is not None
    assert recipe.model.config is not None
    usual, routed = SymphonyConfig(), base.symphony(recipe.symphony)
    for name in _ROUTING:
        value = getattr(recipe.symphony, name)
        if value not in (getattr(usual, name), getattr(routed, name)):
            raise ConfigError(
                f"{_WHERE}: the recipe has symphony.{name} {value}, which the points of a study decide: set it in "
                f"the study's `base`, `base: {{{name}: {value}}}`"
            )
    config = AutoConfig.for_model(**recipe.model.config)
    for name, plain in _PLAIN_FORM.items():
        if getattr(config, name) != plain:
            raise ConfigError(
                f"{_WHERE}: the recipe's model has {name} {getattr(config, name)}, which is a system of its own: take "
                "a recipe of SMoE, and name the systems in the study's `systems`"
            )
