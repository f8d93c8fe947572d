"""A point of the grid: a system, and the settings of its graph."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from symphony_hf.config import Normalization, RouterGradient, Smoothing, SymphonyConfig
from symphony_hf.errors import ConfigError

SYSTEMS: dict[str, dict[str, Any]] = {
    "smoe": {},
    "xmoe": {"router_type": "cosine"},
    "glam": {"moe_every": 2},
    "smoothsmoe": {"router_type": "smooth"},
    "momentumsmoe": {"momentum": 0.7},
}
"""Changes of each system to the model's config; the first three are the paper's."""

System = Literal["smoe", "xmoe", "glam", "smoothsmoe", "momentumsmoe"]
Graph = Literal["ema", "frozen", "learned", "random", "inference", "late", "identity"]
Control = Literal["none", "frozen_routers", "chosen_experts"]
CONTROLS = {
    "frozen_routers": "routers frozen at random",
    "chosen_experts": "only as many experts as are chosen (no routing)",
}
"""Positive controls, with their labels: what learning the routers is worth, and what more experts are worth."""


_WITHOUT_A_GRAPH = ("system", "damage", "selection", "control", "router_gradient")
"""Settings that have an effect without a graph."""

_OTHERS = ("neighbours", "random")
"""Gradients of the router that also take some of the experts that were not chosen."""

_OF_NEIGHBOURS = ("normalization", "self_loops")
"""Settings of the graph that decide, with its decay, which experts are neighbours."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One variant of a study, without its seed.

    Args:
        system: `smoe`, `xmoe` (cosine routers), `glam` (experts in every other block), `smoothsmoe` (an expert just
            below the cut is lifted in) or `momentumsmoe` (the experts' outputs have momentum across blocks).
        strength: See `SymphonyConfig`, as for the next four.
        smoothing: `logits` or `scores`.
        normalization: `row`, `conditional`, `symmetric` or `centred`.
        self_loops: Whether an expert is its own neighbour.
        decay: Decay of the moving average.
        graph: `ema`; `frozen`: the moving average stops after `freeze_after` of the steps; `learned` by gradient;
            `random`: routed by the moving average with its experts shuffled; `inference`: counted in training and
            routed by afterwards only; `late`: its strength rises from 0 over the second half of the steps; `identity`:
            no graph, the plain system.
        freeze_after: Share of the steps before a `frozen` graph stops.
        layers: Decoder layer indices with a graph, the router gradient or the selection; all when None.
        damage: Share of the training input that is replaced at random, anew in each batch, and not scored.
        router_gradient: See `SymphonyConfig`, as for the next one. `neighbours` are those of the counted graph, by
            `normalization`, with `graph: identity`, too.
        num_neighbours: Number of neighbours.
        selection: `top_k`; `conditional`: experts after the first by their logit given the chosen ones, by the counted
            graph, see `selection.py`; it needs `graph: identity` and linear routers.
        control: `frozen_routers` or `chosen_experts`: a control of the study, see `CONTROLS`; it has no graph.

    Raises:
        ConfigError: If a setting is out of range.
    """

    system: System = "smoe"
    strength: float = 1.0
    smoothing: Smoothing = "logits"
    normalization: Normalization = "row"
    self_loops: bool = True
    decay: float = 0.99
    graph: Graph = "ema"
    freeze_after: float = 0.25
    layers: tuple[int, ...] | None = None
    damage: float = 0.0
    router_gradient: RouterGradient = "chosen"
    num_neighbours: int = SymphonyConfig.num_neighbours
    selection: Literal["top_k", "conditional"] = "top_k"
    control: Control = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.damage < 1:
            raise ConfigError(f"`damage` is a share of the training input, from 0 to below 1; got {self.damage}")
        if self.control != "none" and self.graph != "identity":
            raise ConfigError(f"`control` {self.control} has no graph: set `graph: identity`, got {self.graph}")
        if not 0 < self.freeze_after <= 1:
            raise ConfigError(f"`freeze_after` is a share of the steps, above 0 and up to 1; got {self.freeze_after}")
        if self.selection == "conditional":
            linear = SYSTEMS[self.system].get("router_type", "linear") == "linear"
            if self.graph != "identity" or self.control != "none" or not linear:
                raise ConfigError(
                    "`selection` conditional is a form of its own: it needs `graph: identity`, no control, and linear "
                    f"routers; got graph {self.graph}, control {self.control}, system {self.system}"
                )
        self.symphony()  # raises on contradictory settings

    def symphony(self, base: SymphonyConfig | None = None) -> SymphonyConfig:
        """Return a recipe's graph settings with those of this point.

        Args:
            base: The recipe's settings, whose losses and layers are kept.
        """
        return dataclasses.replace(
            base or SymphonyConfig(),
            strength=0.0 if self.graph in ("identity", "inference", "late") else self.strength,
            smoothing=self.smoothing,
            normalization=self.normalization,
            self_loops=self.self_loops,
            decay=self.decay,
            graph="learned" if self.graph == "learned" else "ema",
            router_gradient=self.router_gradient,
            num_neighbours=self.num_neighbours,
            layers=self.layers if base is None or self.layers is not None else base.layers,
        )

    def canonical(self) -> "Point":
        """Return the simplest point with the same routing, so that none is run twice under two names."""
        if self.layers is not None and (ordered := tuple(sorted(set(self.layers)))) != self.layers:
            return dataclasses.replace(self, layers=ordered).canonical()
        if self.graph == "identity" or self.strength == 0:
            is_conditional = self.selection == "conditional"
            names = [*_WITHOUT_A_GRAPH]
            names += ["num_neighbours"] if self.router_gradient in _OTHERS else []
            names += _OF_NEIGHBOURS if self.router_gradient == "neighbours" else ()
            # Both read the counted graph, in the layers that have one.
            names += ["decay"] if is_conditional or self.router_gradient == "neighbours" else []
            names += ["layers"] if is_conditional or self.router_gradient != "chosen" else []
            return Point(graph="identity", strength=0.0, **{name: getattr(self, name) for name in names})
        changes: dict[str, Any] = {}
        if self.graph != "frozen":
            changes["freeze_after"] = Point.freeze_after
        if self.graph == "learned":
            changes["decay"] = Point.decay
        if self.router_gradient not in _OTHERS:
            changes["num_neighbours"] = Point.num_neighbours
        return dataclasses.replace(self, **changes)

    @property
    def is_plain(self) -> bool:
        """Whether it routes without a graph."""
        return self.canonical().graph == "identity"

    @property
    def plain(self) -> "Point":
        """The same system as it is, for comparison: without a graph, undamaged, and no control."""
        return Point(system=self.system, graph="identity").canonical()

    @property
    def without_graph(self) -> "Point":
        """The same point without a graph."""
        return dataclasses.replace(self, graph="identity").canonical()

    @property
    def differs_by_graph(self) -> bool:
        """Whether it differs from the plain system by its graph alone, or not at all."""
        return self.without_graph == self.plain

    def label(self, base: "Point") -> str:
        """Return the system and the differences from a base point, for tables."""
        point, base = self.canonical(), base.canonical()
        if point.control != "none":
            return f"{point.system}, {CONTROLS[point.control]}"
        compared = base.without_graph if point.is_plain else base
        changed = [
            f"{field.name} {_text(getattr(point, field.name))}"
            for field in dataclasses.fields(point)
            if field.name != "system" and getattr(point, field.name) != getattr(compared, field.name)
        ]
        if point.is_plain:
            return ", ".join([point.system, "no graph", *changed])
        if point.graph == "frozen" and f"freeze_after {point.freeze_after:g}" not in changed:
            changed.append(f"freeze_after {point.freeze_after:g}")
        return ", ".join([point.system, *(changed or ["graph"])])


def point_of(values: Mapping[str, Any]) -> Point:
    """Return the point of a report's row. Those of earlier versions lack the later settings."""
    layers = values.get("layers")
    return Point(**{**values, "layers": None if layers is None else tuple(layers)})


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
