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

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import Recipe, load_recipe
from symphony_hf.settings import check_names, parse_settings, read_option, read_yaml

from .point import CONTROLS, SYSTEMS, Point
from .recipe_checks import WHERE, check_points, check_recipe, check_routing, read_number

_LISTS = ("systems", "seeds", "damage", "learning_rates", "tuning_seeds")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Training of a plain model before a fine-tuning study, once for each seed.

    Args:
        path: Text to pre-train on, as `data.path`; what a run forgets is measured on its test split.
        max_steps: Number of optimizer steps, at the recipe's batch size and learning rate, and with the
            study's warm-up steps.
    """

    path: str
    max_steps: int

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ConfigError(f"`max_steps` must be at least 1, got {self.max_steps}")


@dataclass(frozen=True, kw_only=True)
class Study:
    """An ablation study. Every study has the two controls of `CONTROLS` for SMoE.

    Args:
        recipe: Model, text, training and attack of every run; a pre-training recipe of `wikitext_moe`.
        base: Base point of the grid.
        systems: Systems to run at the base point, and as they are.
        axes: Values of each setting to try at the base point. A value that is a mapping sets those settings instead.
        seeds: Seeds of weights, batches and dropout. Runs of the same seed are compared in pairs.
        product: Whether to run all combinations of the axes' values instead of one change at a time. Combinations
            that `SymphonyConfig` refuses are left out.
        damage: Shares of the test characters that are replaced at random; the others are scored. For text by
            `characters`; text by `words` is attacked as the recipe says.
        test_tokens: Maximum number of test tokens; all when None.
        contamination: Share of the training text that is replaced at random, once, and scored like the rest.
        pretraining: Pre-training of the models that the runs fine-tune; they start at random when None.
        learning_rates: Learning rates that each point is tried at; the recipe's alone when empty. The one with the
            lowest loss on held-out training text, as a mean over `tuning_seeds`, is the point's.
        tuning_seeds: Seeds for the choice of the learning rate, none of which is in `seeds`.
        title: Heading of its results in EVIDENCE.md; made of its regime when empty.
        command: Command of the study, for the report, without the path of its text.
    """

    recipe: Recipe
    base: Point = field(default_factory=Point)
    systems: tuple[str, ...] = ("smoe",)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    product: bool = False
    damage: tuple[float, ...] = (0.05, 0.15)
    test_tokens: int | None = None
    contamination: float = 0.0
    pretraining: Pretraining | None = None
    learning_rates: tuple[float, ...] = ()
    tuning_seeds: tuple[int, ...] = ()
    title: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        for system in self.systems:
            if system not in SYSTEMS:
                raise ConfigError(f"{WHERE}: `systems` has {system!r}; known are {', '.join(SYSTEMS)}")
        if not isinstance(self.title, str):
            raise ConfigError(f"{WHERE}: `title` must be text; got {self.title!r}")
        if not isinstance(self.product, bool):
            raise ConfigError(f"{WHERE}: `product` must be true or false; got {self.product!r}")
        self._check_seeds()
        self._check_shares()
        if self.axes and self.base.is_plain:
            raise ConfigError(f"{WHERE}: the base point has no graph that the axes could change: give it one")
        check_recipe(self.recipe)
        points = self.points()
        check_routing(self.recipe, self.base, points)
        check_points(self.recipe, self.base, points)

    def _check_seeds(self) -> None:
        for name in ("seeds", "tuning_seeds"):
            seeds = getattr(self, name)
            if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
                raise ConfigError(f"{WHERE}: `{name}` must be whole numbers; got {list(seeds)}")
            if len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
                raise ConfigError(f"{WHERE}: `{name}` must be one or more, each once; got {list(seeds)}")
            if max(seeds, default=0) >= 2**63:
                raise ConfigError(f"{WHERE}: `{name}` must be below 2**63; got {max(seeds)}")
        if not self.seeds:
            raise ConfigError(f"{WHERE}: `seeds` must be one or more, each once; got []")
        if bool(self.learning_rates) != bool(self.tuning_seeds):
            raise ConfigError(f"{WHERE}: `learning_rates` and `tuning_seeds` belong together: give both or neither")
        if shared := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ConfigError(
                f"{WHERE}: seeds {', '.join(map(str, shared))} are in `seeds` and in `tuning_seeds`: a form is not "
                "judged on the runs that its learning rate was chosen by"
            )

    def _check_shares(self) -> None:
        rates = self.learning_rates
        if not all(_is_number(rate) and 0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
            raise ConfigError(f"{WHERE}: `learning_rates` must be positive numbers, each once; got {list(rates)}")
        if self.test_tokens is not None and not (type(self.test_tokens) is int and self.test_tokens > 0):
            raise ConfigError(f"{WHERE}: `test_tokens` must be a positive whole number; got {self.test_tokens!r}")
        shares = {"contamination": [self.contamination], "damage": list(self.damage)}
        for name, values in shares.items():
            for value in values:
                if not _is_number(value) or not 0 <= value < 1 or (name == "damage" and value == 0):
                    low = "above 0" if name == "damage" else "from 0"
                    raise ConfigError(f"{WHERE}: `{name}` is a share of the text, {low} to below 1; got {value!r}")
        if len(set(self.damage)) < len(self.damage) or not self.damage:
            raise ConfigError(f"{WHERE}: `damage` must be one or more rates, each once; got {list(self.damage)}")

    @property
    def by_characters(self) -> bool:
        """Whether the text is read by characters, and otherwise by words."""
        return self.recipe.data.tokenizer == "characters"

    @property
    def steps(self) -> int:
        """Number of optimizer steps of a run."""
        return int(read_number(self.recipe, "max_steps"))

    @property
    def batch_size(self) -> int:
        """Batch size."""
        return int(read_number(self.recipe, "per_device_train_batch_size"))

    @property
    def learning_rate(self) -> float:
        """Learning rate after the warm-up."""
        return read_number(self.recipe, "learning_rate")

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps; the recipe may give a share of all steps."""
        value = read_number(self.recipe, "warmup_steps", 0.0)
        if self.recipe.train.get("lr_scheduler_type") == "constant":
            return 0  # as Trainer has it
        return math.ceil(value * self.steps) if value < 1 else int(value)

    @property
    def tokens(self) -> int:
        """Number of training tokens of a run."""
        return self.steps * self.batch_size * self.recipe.data.block_size

    def points(self) -> list[Point]:
        """Return all distinct points: SMoE and its controls, the systems at the base point, the axes' values.

        Each comes after what it is compared with: its system as it is, and itself without a graph.
        """
        controls = [Point(graph="identity"), *(Point(graph="identity", control=name) for name in CONTROLS)]  # type: ignore[arg-type]
        points = controls + [point for one in self.systems for point in _compared(_changed(self.base, {"system": one}))]
        changed = [_changed(self.base, change) for change in self._changes() if not _refusal(self.base, change)]
        points += [point for one in changed for point in _compared(one)]
        return list(dict.fromkeys(point.canonical() for point in points))

    def left_out(self) -> list[str]:
        """Return the combinations that are refused or change nothing, and why."""
        reasons = [(change, _refusal(self.base, change) or self._no_change(change)) for change in self._changes()]
        return [f"{_named(change)}: {why}" for change, why in reasons if why]

    def _no_change(self, change: dict[str, Any]) -> str:
        """Return that a change of the base point changes none of its runs, or nothing if it does."""
        changed = _changed(self.base, change)
        is_vain = changed != self.base and changed.canonical() == self.base.canonical()
        return "the runs would be those of the base point" if is_vain else ""

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
    values = read_yaml(path, where)
    known = ("recipe", "overrides", "base", "axes", "product", "test_tokens", "contamination", "pretraining", "title")
    values = check_names(values, (*known, *_LISTS), where)
    changes = dict(overrides or {})
    if values.get("pretraining") is not None or any(name.startswith("pretraining.") for name in changes):
        pretraining = check_names(values.get("pretraining") or {}, None, f"{where}: pretraining")
        for name in [name for name in changes if name.startswith("pretraining.")]:
            pretraining[name.removeprefix("pretraining.")] = changes.pop(name)
        values["pretraining"] = parse_settings(Pretraining, pretraining, f"{where}: pretraining")
    if not isinstance(values.get("recipe"), str):
        raise ConfigError(f"{where}: `recipe` must be the path of a recipe, from the study's folder")
    settings = check_names(values.pop("overrides", None) or {}, None, f"{where}: overrides")
    recipe = load_recipe(path.parent / values.pop("recipe"), {**settings, **changes})
    base = parse_settings(Point, values.pop("base", None) or {}, f"{where}: base")
    axes = check_names(values.pop("axes", None) or {}, None, f"{where}: axes")
    for name, choices in axes.items():
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: axis `{name}` must be a list of values, got {choices!r}")
        for choice in choices:
            parse_settings(Point, _change(name, choice), f"{where}: axis `{name}`")
    for name in _LISTS:
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
    pairs = [text.split("=", 1) for text in texts]
    return {name: read_option(f"symphony ablate: --set {name}", value) for name, value in pairs}


def _command(path: Path, overrides: dict[str, Any]) -> str:
    places = {"data.path": "TEXT", "pretraining.path": "FIRST_TEXT"}
    shown = {name: places.get(name, value) for name, value in overrides.items()}
    changes = [word for name, value in shown.items() for word in ("--set", f"{name}={_yaml(value)}")]
    return shlex.join(["symphony", "ablate", str(path), "--output", "DIR", *changes])


def _yaml(value: Any) -> str:
    """Format a value on one line of YAML."""
    is_word = isinstance(value, str) and yaml.safe_load(value) == value
    return value if is_word else json.dumps(value)


def _compared(point: Point) -> tuple[Point, Point, Point]:
    """Return a point, after what it is compared with: its system as it is, and itself without a graph."""
    return point.plain, point.without_graph, point


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
    return parse_settings(Point, {**dataclasses.asdict(point), **change}, WHERE)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
