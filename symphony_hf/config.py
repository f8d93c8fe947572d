"""Settings as dataclasses that refuse what they do not understand: SymphonyConfig and the recipe's sections."""

import dataclasses
import inspect
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError, nearest


def check_names(settings: Any, known: Iterable[str] | None, where: str) -> dict[str, Any]:
    """Settings by name, with known names alone.

    Args:
        settings: What should be settings by name.
        known: Names; any when None.
        where: What they are, for the error message: "recipe.yaml: data".

    Raises:
        ConfigError: If they are no mapping, or a name is not known; it says which known one is nearest.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{where}: expected settings by name, got {settings!r}")
    known = None if known is None else list(known)
    for name in settings:
        if known is not None and name not in known:
            raise ConfigError(f"{where}: unknown setting `{name}`; {nearest(str(name), known)}")
    return dict(settings)


def parse_settings(cls: type, settings: Mapping[str, Any], where: str, **fixed: Any) -> Any:
    """Build a dataclass from settings by name, each read as its field's type: `1e-4`, which is text to YAML, too.

    Args:
        cls: The dataclass, ours or another library's.
        settings: Its fields by name.
        where: What they are, for the error message.
        **fixed: Fields that `settings` may change.

    Raises:
        ConfigError: If a name is not known, a value is not of its type, or the dataclass refuses it.
    """
    from jsonargparse import ArgumentError, ArgumentParser  # here: `import symphony_hf` comes by, and need not wait

    settings = check_names(settings, inspect.signature(cls).parameters, where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    try:
        values = parser.parse_object({"settings": {**fixed, **settings}})
        return parser.instantiate(values).settings
    except ArgumentError as error:
        named = re.search(r'Parser key "settings\.(\w+)', str(error))
        problem = str(error) if named is None else _of_wrong_type(cls, named.group(1), settings)
        raise ConfigError(f"{where}: {problem}") from error
    except (ValueError, TypeError) as error:  # ConfigError is one, of our own dataclasses
        raise ConfigError(f"{where}: {error}") from error


def _of_wrong_type(cls: type, name: str, settings: Mapping[str, Any]) -> str:
    wanted, got = typing.get_type_hints(cls)[name], settings.get(name)
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    kinds = typing.get_args(wanted) if is_union else (wanted,)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if words:
        return f"`{name}` is {got!r}; {nearest(str(got), words)}"
    names = ("null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    return f"`{name}` must be {' or '.join(names)}, got {got!r}"


def changed_settings(settings: Any) -> dict[str, Any]:
    """Return the fields of a settings dataclass that are not at their defaults, by name."""
    values = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return {field.name: value for field, value in values if value != field.default}


def command_line(command: str, *arguments: str, **options: Any) -> str:
    """Return a `symphony` command, quoted for a shell. The values of a sequence are separated by commas."""
    words = ["symphony", command, *arguments]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", text]
    return shlex.join(words)


FORMAT = 1
"""Of the settings in a checkpoint's config.json. A checkpoint with a higher one is refused."""

GRAPHS = ("ema", "frozen", "learned")
"""What `graph` may be in a model; `symphonize` takes a path, too, and goes on from there by `ema`."""

Smoothing = Literal["logits", "scores"]
Normalization = Literal["row", "conditional", "symmetric"]
BalanceScope = Literal["local", "global"]


def from_mapping(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a mapping; an unknown key is a ConfigError that names the nearest known one.

    Args:
        cls: The dataclass.
        values: Its fields by name.
        where: What the mapping is, for the error message: "symphony", "recipe.yaml: data".

    Raises:
        ConfigError: If `values` is no mapping, or has an unknown key, or lacks a required one.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = check_names(values, fields, where)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise ConfigError(f"{where}: `{name}` is missing")
    return cls(**values)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"symphony: `{name}` must be a number, got {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"symphony: `{name}` must be between {low:g} and {high:g}, got {value!r}")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"symphony: `{name}` is {value!r}; {nearest(str(value), known)}")


@dataclass(frozen=True, kw_only=True)
class SymphonyConfig:
    """How a model is routed through the graph of its experts, and how that graph is learned.

    Args:
        strength: s in A = (1 - s) I + s P, in [0, 1]. 0 computes what the base model computes.
        smoothing: `logits`: the graph mixes the router's logits, and folds into a plain router exactly.
            `scores`: it mixes the probabilities after softmax, and cannot be folded.
        normalization: `row`, `conditional` or `symmetric`; see `routing.transition_matrix`.
        self_loops: Whether an expert hears itself as well as its neighbours.
        decay: Of the moving average; the graph forgets over about 1 / (1 - decay) updates. In [0, 1].
        warmup_steps: Updates of the graph over which the strength ramps up from 0, linearly.
        graph: `ema`: learned by a moving average of co-selections. `frozen`: stays as it is. `learned`: a
            parameter, learned by gradient with the model's optimizer. Or the path of a Symphony checkpoint
            (a folder, or a .safetensors file) whose graph to start from, and then move by `ema`; a decay of 1
            keeps it as it is. A warm-up starts anew.
        layers: Numbers of the decoder layers to symphonize; all that have a router when None. The router losses are
            these layers' alone.
        routers: Patterns of module names, as in a shell (`*.mlp.gate`), of routers that are not found by themselves:
            `nn.Linear` gates of remote-code and home-made models. Only they are symphonized then.
        top_k: With `routers`: how many experts the highest logits choose. None: seen from the gate's block.
        balance_loss_weight: Of the load-balancing loss, averaged over layers, added in the backward pass.
        balance_scope: `local`: each micro-batch of each rank is balanced by itself. `global`: by the load of all
            ranks, as if they had one batch, which costs one small all-reduce a forward. It is refused where a router
            is in a part that one rank's batch may leave out, such as a vision tower.
        z_loss_weight: Of the router z-loss, likewise.

    Raises:
        ConfigError: If a value is unknown or out of range.

    Source: arXiv 2510.16411. Deviation: the paper publishes no decay, normalization or diagonal; the loss weights
    are those of LibMoE's visual instruction tuning.
    """

    strength: float = 1.0
    smoothing: Smoothing = "logits"
    normalization: Normalization = "row"
    self_loops: bool = True
    decay: float = 0.99
    warmup_steps: int = 0
    graph: str = "ema"
    layers: tuple[int, ...] | None = None
    routers: tuple[str, ...] | None = None
    top_k: int | None = None
    balance_loss_weight: float = 0.01
    balance_scope: BalanceScope = "local"
    z_loss_weight: float = 0.001

    def __post_init__(self) -> None:
        _check_number("strength", self.strength, 0, 1)
        _check_number("decay", self.decay, 0, 1)
        _check_number("warmup_steps", self.warmup_steps, 0, 2**53)
        _check_number("balance_loss_weight", self.balance_loss_weight, 0, 1e6)
        _check_number("z_loss_weight", self.z_loss_weight, 0, 1e6)
        _check_choice("smoothing", self.smoothing, get_args(Smoothing))
        _check_choice("normalization", self.normalization, get_args(Normalization))
        _check_choice("balance_scope", self.balance_scope, get_args(BalanceScope))
        if int(self.warmup_steps) != self.warmup_steps:
            raise ConfigError(f"symphony: `warmup_steps` must be a whole number, got {self.warmup_steps!r}")
        if not isinstance(self.self_loops, bool):
            raise ConfigError(f"symphony: `self_loops` must be true or false, got {self.self_loops!r}")
        if not isinstance(self.graph, str) or not self.graph:
            raise ConfigError(f"symphony: `graph` must be ema, frozen, learned or a path, got {self.graph!r}")
        if self.smoothing == "scores" and self.normalization != "row":
            raise ConfigError(
                f"symphony: smoothing `scores` needs normalization `row`, got `{self.normalization}`: only a "
                "row-stochastic matrix keeps a distribution one"
            )
        if self.graph == "learned" and not self.self_loops:
            raise ConfigError(
                "symphony: graph `learned` needs `self_loops`: without them no expert has a neighbour at the start, "
                "and no gradient ever gives it one"
            )
        self._check_layers()
        self._check_routers()

    def _check_layers(self) -> None:
        layers: Any = self.layers
        if layers is None:
            return
        known = isinstance(layers, tuple | list | set | range) and len(layers) > 0
        if not known or not all(type(n) is int and n >= 0 for n in layers):
            raise ConfigError(f"symphony: `layers` must be a list of layer numbers, or null for all, got {layers!r}")
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))

    def _check_routers(self) -> None:
        if self.routers is None:
            if self.top_k is not None:
                raise ConfigError("symphony: `top_k` belongs to `routers`; the routers of transformers know theirs")
            return
        patterns = (self.routers,) if isinstance(self.routers, str) else self.routers
        known = isinstance(patterns, tuple | list) and len(patterns) > 0
        if not known or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigError(f"symphony: `routers` must be patterns of module names, got {self.routers!r}")
        object.__setattr__(self, "routers", tuple(patterns))
        if self.top_k is None:
            return
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise ConfigError(f"symphony: `top_k` must be a number of experts from 1 on, got {self.top_k!r}")

    @property
    def counts_selections(self) -> bool:
        """Whether training moves the graph by counting which experts are chosen together."""
        return self.graph == "ema"

    @property
    def weighs_losses(self) -> bool:
        """Whether training has router losses at all."""
        return self.balance_loss_weight > 0 or self.z_loss_weight > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as config.json stores them under `symphony`, with the format's number."""
        values = dataclasses.asdict(self)
        for name in ("layers", "routers"):
            if values[name] is not None:
                values[name] = list(values[name])
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "symphony") -> "SymphonyConfig":
        """Read what `to_dict` wrote, or settings without a format number.

        Raises:
            ConfigError: If the format is newer than this version's, or a setting is unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected settings by name, got {values!r}")
        values = dict(values)
        version = values.pop("format", FORMAT)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ConfigError(f"{where}: `format` must be a whole number from 1 on, got {version!r}")
        if version > FORMAT:
            raise ConfigError(
                f"{where}: this checkpoint has format {version}, this symphony_hf reads up to {FORMAT}: upgrade it"
            )
        if isinstance(values.get("layers"), list):
            values["layers"] = tuple(values["layers"])
        return from_mapping(cls, values, where)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], where: str = "symphony") -> "SymphonyConfig":
        """Read the settings that a model or an adapter was saved with. Their graphs are its own, not another's.

        Raises:
            ConfigError: As `from_dict`; or if `graph` is a path, which only `symphonize` goes by.
        """
        settings = cls.from_dict(values, where)
        if settings.graph not in GRAPHS:
            raise ConfigError(
                f"{where}: `graph` is {settings.graph!r}; {nearest(settings.graph, GRAPHS)}. A path is for "
                "`symphonize(model, graph=PATH)` alone"
            )
        return settings
