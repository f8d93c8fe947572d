"""SymphonyConfig: the settings of Symphony routing."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError, nearest
from .settings import from_mapping

FORMAT = 2
"""Format version of the settings in a checkpoint's config.json. Higher versions are refused."""

GRAPHS = ("ema", "frozen", "learned")
"""Values of `graph` in a model. `symphonize` also takes a path, whose graph it continues with `ema`."""

Smoothing = Literal["logits", "scores"]
Normalization = Literal["row", "conditional", "symmetric", "centred"]
Balance = Literal["loss", "bias"]
BalanceScope = Literal["local", "global", "step", "last_step"]
RouterGradient = Literal["chosen", "dense", "neighbours", "random"]


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **{"strength": 1.0, "smoothing": "logits", "normalization": "row", "self_loops": True, "graph": "ema"},
        **{"decay": 0.99, "warmup_steps": 0, "router_gradient": "chosen", "balance": "loss"},
    },
    "dense_gradient": {"strength": 0.0, "router_gradient": "dense"},
}
"""Settings by the name of a preset. `paper`: our reading of the paper's form, whatever the defaults become; the loss
weights are the defaults. `dense_gradient`: the stock forward, with all experts in the router's gradient, as
DenseMixer."""


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
    """Settings of Symphony routing: how the expert graph changes the routing, and how the graph is updated.

    Args:
        strength: s in A = (1 - s) I + s P, in [-1, 1]. 0 computes what the base model computes. If negative, experts
            that are chosen together lower each other's logits.
        smoothing: `logits`: the graph mixes the router's logits, and folds exactly into a plain router. `scores`: the
            graph mixes the probabilities after softmax, and cannot be folded.
        normalization: `row`, `conditional`, `symmetric` or `centred`; see `routing.transition_matrix`.
        self_loops: Whether an expert is its own neighbour. `centred` always keeps its own logit whole.
        decay: Decay of the moving average, in [0, 1]. The graph averages over about 1 / (1 - decay) updates.
        warmup_steps: Number of graph updates over which the strength increases linearly from 0.
        graph: `ema`: a moving average of co-selections. `frozen`: constant. `learned`: a parameter, trained
            by the model's optimizer. Or the path of a Symphony checkpoint (a folder, or a .safetensors file) whose
            graph to start from and to update by `ema`; a decay of 1 keeps it constant. The warm-up restarts.
        layers: Indices of the decoder layers to symphonize; all layers with a router when None. The router losses
            cover only these layers.
        routers: Shell-style patterns of module names (`*.mlp.gate`) of routers that are not detected: `nn.Linear` gates
            of remote-code and custom models. Only these are symphonized then.
        top_k: Number of experts per token of `routers`; read from the gate's block when None.
        balance: `loss`: a loss balances the load. `bias`: the bias by which some families (DeepSeek-V3, GLM-4.5 and
            others) choose experts is raised at each graph update for those below the mean load, and lowered for others.
        bias_rate: Step of that bias, up or down.
        balance_loss_weight: Weight of the load-balancing loss, averaged over layers and added in the backward pass.
        balance_scope: `local`: each micro-batch of each rank is balanced separately. `global`: the load of all ranks
            is balanced, as of one batch, at the cost of one small all-reduce per forward. `step`: also that of the
            optimizer step's micro-batches so far. Both are refused if a router is in a part that a rank's batch may
            skip, such as a vision tower. `last_step`: every micro-batch is balanced by the load of the whole optimizer
            step before, of all ranks; the first step is not balanced.
        z_loss_weight: Weight of the router z-loss, averaged and added in the same way.
        router_gradient: Experts whose outputs the router's gradient takes into account, in an unchanged forward: those
            that are `chosen`, all (`dense`), or the chosen and `num_neighbours` others for each token: `neighbours`,
            those that the graph, whatever its strength, says are chosen with them most; `random`, a control.
        num_neighbours: Number of these others.

    Raises:
        ConfigError: If a value is unknown or out of range.

    Source: arXiv 2510.16411. Deviation: the paper publishes no decay, normalization or diagonal; the loss weights
    are those of LibMoE's visual instruction tuning. The bias and its rate are those of arXiv 2408.15664.
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
    balance: Balance = "loss"
    bias_rate: float = 0.001
    balance_loss_weight: float = 0.01
    balance_scope: BalanceScope = "local"
    z_loss_weight: float = 0.001
    router_gradient: RouterGradient = "chosen"
    num_neighbours: int = 2

    def __post_init__(self) -> None:
        _check_number("strength", self.strength, -1, 1)
        _check_number("decay", self.decay, 0, 1)
        _check_number("warmup_steps", self.warmup_steps, 0, 2**53)
        _check_number("bias_rate", self.bias_rate, 0, 1)
        _check_number("balance_loss_weight", self.balance_loss_weight, 0, 1e6)
        _check_number("z_loss_weight", self.z_loss_weight, 0, 1e6)
        _check_choice("smoothing", self.smoothing, get_args(Smoothing))
        _check_choice("normalization", self.normalization, get_args(Normalization))
        _check_choice("balance", self.balance, get_args(Balance))
        _check_choice("balance_scope", self.balance_scope, get_args(BalanceScope))
        _check_choice("router_gradient", self.router_gradient, get_args(RouterGradient))
        if type(self.num_neighbours) is not int or self.num_neighbours < 1:
            raise ConfigError(f"symphony: `num_neighbours` must be a number from 1 on, got {self.num_neighbours!r}")
        if int(self.warmup_steps) != self.warmup_steps:
            raise ConfigError(f"symphony: `warmup_steps` must be a whole number, got {self.warmup_steps!r}")
        if not isinstance(self.self_loops, bool):
            raise ConfigError(f"symphony: `self_loops` must be true or false, got {self.self_loops!r}")
        if not isinstance(self.graph, str) or not self.graph:
            raise ConfigError(f"symphony: `graph` must be ema, frozen, learned or a path, got {self.graph!r}")
        if self.smoothing == "scores" and self.normalization != "row":
            raise ConfigError(
                f"symphony: smoothing `scores` needs normalization `row`, got `{self.normalization}`: only a "
                "row-stochastic matrix keeps probabilities a distribution"
            )
        if self.smoothing == "scores" and self.strength < 0:
            raise ConfigError(
                f"symphony: smoothing `scores` needs a strength from 0 on, got {self.strength!r}: a negative one gives "
                "negative probabilities"
            )
        if self.normalization == "centred" and not self.self_loops:
            raise ConfigError("symphony: normalization `centred` needs `self_loops`: it never uses the diagonal")
        if self.graph == "learned" and not self.self_loops:
            raise ConfigError(
                "symphony: graph `learned` needs `self_loops`: without them, no expert has a neighbour at the start, "
                "and no gradient can add one"
            )
        self._check_layers()
        self._check_routers()
        if self.balance == "bias":
            if self.balance_loss_weight not in (0, type(self).balance_loss_weight):
                raise ConfigError("symphony: `balance_loss_weight` needs balance `loss`: balance `bias` has no loss")
            object.__setattr__(self, "balance_loss_weight", 0.0)

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
                raise ConfigError("symphony: `top_k` needs `routers`; it is known for the routers of transformers")
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
        """Whether training updates the graph with counts of experts chosen together."""
        return self.graph == "ema"

    @property
    def balances(self) -> bool:
        """Whether the load of the experts is balanced, in place of the model's own balance loss."""
        return self.balance == "bias" or self.balance_loss_weight > 0

    @property
    def weighs_losses(self) -> bool:
        """Whether training has router losses."""
        return self.balance_loss_weight > 0 or self.z_loss_weight > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as config.json stores them under `symphony`, with the format version."""
        values = dataclasses.asdict(self)
        for name in ("layers", "routers"):
            if values[name] is not None:
                values[name] = list(values[name])
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "symphony") -> "SymphonyConfig":
        """Read the output of `to_dict`, or settings without a format version.

        Raises:
            ConfigError: If the format is newer than `FORMAT`, or a setting is unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected settings by name, got {values!r}")
        values = dict(values)
        values.pop("model_class", None)  # for the config's file, and not a setting
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
    def preset(cls, name: str) -> "SymphonyConfig":
        """Return the settings of a preset.

        Raises:
            ConfigError: If the preset is unknown.
        """
        if name not in PRESETS:
            raise ConfigError(f"symphony: preset {name!r} is unknown; {nearest(str(name), PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], where: str = "symphony") -> "SymphonyConfig":
        """Read the settings that a model or an adapter was saved with, which has its own graphs.

        Raises:
            ConfigError: As `from_dict`; or if `graph` is a path, which only `symphonize` accepts.
        """
        settings = cls.from_dict(values, where)
        if settings.graph not in GRAPHS:
            raise ConfigError(
                f"{where}: `graph` is {settings.graph!r}; {nearest(settings.graph, GRAPHS)}. Only "
                "`symphonize(model, graph=PATH)` takes a path"
            )
        return settings


def settings_of(
    config: SymphonyConfig | Mapping[str, Any] | None, preset: str | None, overrides: Mapping[str, Any]
) -> SymphonyConfig:
    """Return the settings that the arguments of `symphonize` give; it documents them."""
    if config is not None and preset is not None:
        raise ConfigError("symphonize: `preset` takes the place of `config`: give one of them, and single settings")
    if config is None:
        config = SymphonyConfig() if preset is None else SymphonyConfig.preset(preset)
    elif not isinstance(config, SymphonyConfig):
        config = SymphonyConfig.from_dict(config)
    known = {field.name for field in dataclasses.fields(SymphonyConfig)}
    for name in overrides:
        if name not in known:
            raise ConfigError(f"symphonize: unknown setting `{name}`; {nearest(name, known)}")
    if config.balance == "bias" and overrides.get("balance") == "loss":  # `bias` has set the loss's weight to 0
        overrides = {"balance_loss_weight": SymphonyConfig.balance_loss_weight, **overrides}
    return dataclasses.replace(config, **overrides)
