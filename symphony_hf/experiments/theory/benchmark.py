"""`symphony theory`: convergence of the moving average to a planted graph, and the gain of routing by it."""

import dataclasses
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symphony_hf.compat import __version__
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.statistics import t_interval
from symphony_hf.files import write_json
from symphony_hf.results import check_results
from symphony_hf.routing.graph import count_coselections, initial_adjacency, transition_matrix, update_adjacency
from symphony_hf.routing.smoothing import smooth_logits
from symphony_hf.settings import changed_settings, command_line

from .planted import TOP_K, Planted, draw_tokens, plant, share_right

OPTIONS = {"num_experts": "experts", "num_communities": "communities"}
"""Command-line options whose names differ from their settings'."""

NO_OPTION = ("batch", "updates", "noises", "test_tokens")
"""Settings without a command-line option."""

PICTURES = ("convergence.png", "shares.png")
"""Files beside `theory.json`."""

ROUTINGS = ("smoe", "symphony", "true graph")
"""No graph; the graph of the router's own noisy choices; the planted graph, an upper bound."""

FIXED_DECAY, SOME_NOISE = 0.99, 0.4
CURVES: dict[str, tuple[float | None, float]] = {
    "suited decay": (None, 0.0),
    f"decay {FIXED_DECAY:g}": (FIXED_DECAY, 0.0),
    f"suited decay, noise {SOME_NOISE:g}": (None, SOME_NOISE),
}
"""(decay, noise of the logits) by name; None is a decay suited to the number of updates."""


@dataclass(frozen=True, kw_only=True)
class TheorySettings:
    """Settings of the benchmark. The defaults take under a minute on one core.

    Args:
        output: Folder of theory.json and the pictures.
        seeds: Number of seeds of the planted graph, the tokens and the noise, from 0.
        num_experts: Number of experts.
        num_communities: Number of expert communities, all of one size.
        within: Probability that a token's two experts are in the same community.
        batch: Tokens per update.
        updates: Numbers of updates after which the graph is compared. Routing is tested after the last.
        noises: Standard deviations of the logits' noise; correct logits are 1, the others 0.
        test_tokens: Number of tokens to test routing on.
    """

    output: str = "symphony-theory"
    seeds: int = 5
    num_experts: int = 16
    num_communities: int = 4
    within: float = 0.9
    batch: int = 64
    updates: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024)
    noises: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
    test_tokens: int = 20_000

    def __post_init__(self) -> None:
        if self.num_communities < 1 or self.num_experts < 2 * self.num_communities:
            raise ConfigError(
                f"theory: {self.num_communities} communities of {self.num_experts} experts; each needs at least two"
            )
        if self.num_experts % self.num_communities:
            raise ConfigError(
                f"theory: {self.num_experts} experts cannot be divided into {self.num_communities} equal communities"
            )
        if self.num_communities == 1 and self.within < 1:
            raise ConfigError(
                f"theory: with one community all pairs are within it, so `within` must be 1; got {self.within:g}"
            )
        if not 0 < self.within <= 1 or min(self.noises, default=-1.0) < 0:
            raise ConfigError("theory: `within` is above 0 and up to 1, and `noises` are one or more, none negative")
        if len(self.updates) < 2 or min(self.updates) < 2 or self.seeds < 1:
            raise ConfigError("theory: `updates` must be two or more numbers from 2 on, and `seeds` one or more")


def run_theory(settings: TheorySettings) -> dict[str, Any]:
    """Run the benchmark, and write `theory.json`, `convergence.png` and `shares.png`.

    Returns:
        The values of `theory.json`.

    Raises:
        ConfigError: If the folder is not writable, or has files of these names that `symphony theory` did not write.
    """
    output = Path(settings.output)
    check_results(output / "theory.json", PICTURES, "theory", ("convergence", "shares"))
    started = time.perf_counter()
    result = {
        **_measure(settings),
        "command": _command(settings),
        "seconds": time.perf_counter() - started,
        "machine": {"symphony_hf": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "output": str(settings.output),
    }
    from symphony_hf.diagnostics import plots  # matplotlib is slow to import

    write_json(output / "theory.json", result)
    plots.plot_convergence(result["convergence"], output / PICTURES[0])
    plots.plot_shares(result["shares"], output / PICTURES[1])
    return result


def _command(settings: TheorySettings) -> str:
    """Return the command with these settings; the function's name if the command lacks an option."""
    changed = changed_settings(settings)
    changed.pop("output", None)
    if changed.keys() & set(NO_OPTION):
        return f"symphony_hf.experiments.theory.{run_theory.__name__}, see its settings"
    return command_line("theory", **{OPTIONS.get(name, name): value for name, value in changed.items()})


def _measure(settings: TheorySettings) -> dict[str, Any]:
    distances: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    expected: dict[str, list[list[float]]] = {name: [] for name, (_, noise) in CURVES.items() if noise == 0}
    bias: dict[float, list[float]] = {noise: [] for noise in settings.noises}
    shares: dict[str, dict[float, list[float]]] = {name: {noise: [] for noise in settings.noises} for name in ROUTINGS}
    for seed in range(settings.seeds):
        generator = torch.Generator().manual_seed(seed)
        planted = plant(settings.num_experts, settings.num_communities, settings.within, generator)
        for name, (decay, noise) in CURVES.items():
            distances[name].append(_distances(settings, planted, decay, noise, generator))
            if noise == 0:
                expected[name].append([expected_distance(planted, settings.batch, n, decay) for n in settings.updates])
        for noise in settings.noises:
            learned_EE = _learn(settings, planted, noise, max(settings.updates), None, generator)
            bias[noise].append(distance(learned_EE, planted))
            _add_shares(shares, settings, planted, noise, learned_EE, generator)
    values = {**dataclasses.asdict(settings), "seeds": list(range(settings.seeds))}
    values.pop("output")
    return {
        "settings": values,
        "convergence": [_curve(settings, name, runs, expected.get(name)) for name, runs in distances.items()],
        "distance_under_noise": [{"noise": noise, **_interval(found)} for noise, found in bias.items()],
        "shares": {
            name: [{"noise": noise, **_interval(found)} for noise, found in by_noise.items()]
            for name, by_noise in shares.items()
        },
        "gains": [
            {"noise": noise, **_gain(shares["symphony"][noise], shares["smoe"][noise])} for noise in settings.noises
        ],
    }


def distance(adjacency_EE: Tensor, planted: Planted) -> float:
    """Compute the distance to the planted probabilities in the Frobenius norm, relative to theirs."""
    true_EE = planted.probabilities_EE
    return float(torch.linalg.matrix_norm(adjacency_EE - true_EE) / torch.linalg.matrix_norm(true_EE))


def suited_decay(updates: int) -> float:
    """Return the decay that balances the weight of the start, decay^updates, and the sampling error.

    With 1 - decay = log(updates) / (2 updates), the start has a weight of updates^-1/2, and the sampling error is that
    of about 4 updates / log(updates) updates: both fall as updates^-1/2, the latter up to a logarithm.
    """
    return 1 - math.log(updates) / (2 * updates)


def expected_distance(planted: Planted, batch: int, updates: int, decay: float | None) -> float:
    """Compute the root mean square of `distance` in closed form, for tokens that choose their correct experts.

    The start decays as decay^updates. The sampling errors of the updates, (1 - decay) decay^age times a mean of `batch`
    choices, add up in squares.
    """
    decay = suited_decay(updates) if decay is None else decay
    true_EE = planted.probabilities_EE.double()
    start_EE = initial_adjacency(len(true_EE), TOP_K).double()
    forgotten = decay ** (2 * updates)
    spread = (1 - decay) / (1 + decay) * (1 - forgotten) / batch
    square = forgotten * (start_EE - true_EE).square().sum() + spread * (true_EE * (1 - true_EE)).sum()
    return float(square.sqrt() / torch.linalg.matrix_norm(true_EE))


def _curve(
    settings: TheorySettings, name: str, runs: list[list[float]], expected: list[list[float]] | None
) -> dict[str, Any]:
    """Return a curve of the picture: distance by tokens, over seeds."""
    tokens = [updates * settings.batch for updates in settings.updates]
    curve: dict[str, Any] = {
        "name": name,
        "tokens": tokens,
        "distance": [_interval([run[index] for run in runs]) for index in range(len(tokens))],
        "slope": _interval([_slope(tokens, run) for run in runs]),
    }
    if expected is not None:
        mean = [float(value) for value in np.mean(expected, axis=0)]
        curve |= {"expected": mean, "expected_slope": _slope(tokens, mean)}
    return curve


def _slope(tokens: Sequence[int], distances: Sequence[float]) -> float:
    """Fit the exponent of the distances as a power of the number of tokens, on logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(distances), 1)[0])


def _learn(
    settings: TheorySettings,
    planted: Planted,
    noise: float,
    updates: int,
    decay: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Compute the moving average of the choices of a router that routes by its current graph."""
    decay = suited_decay(updates) if decay is None else decay
    adjacency_EE = initial_adjacency(settings.num_experts, TOP_K)
    num_tokens = torch.tensor(float(settings.batch))
    for _ in range(updates):
        logits_TE, _ = draw_tokens(planted, settings.batch, noise, generator)
        logits_TE = smooth_logits(logits_TE, transition_matrix(adjacency_EE))
        counts_EE = count_coselections(logits_TE.topk(TOP_K).indices, settings.num_experts)
        adjacency_EE = update_adjacency(adjacency_EE, counts_EE, num_tokens, decay)
    return adjacency_EE


def _distances(
    settings: TheorySettings, planted: Planted, decay: float | None, noise: float, generator: torch.Generator
) -> list[float]:
    """Return the distance after each number of updates, each learned from scratch."""
    return [
        distance(_learn(settings, planted, noise, updates, decay, generator), planted) for updates in settings.updates
    ]


def _add_shares(
    shares: dict[str, dict[float, list[float]]],
    settings: TheorySettings,
    planted: Planted,
    noise: float,
    learned_EE: Tensor,
    generator: torch.Generator,
) -> None:
    """Add the share of correct experts that each routing chooses, on the same tokens."""
    logits_TE, right_T2 = draw_tokens(planted, settings.test_tokens, noise, generator)
    graphs = {
        "smoe": torch.eye(settings.num_experts),
        "symphony": transition_matrix(learned_EE),
        "true graph": transition_matrix(planted.probabilities_EE),
    }
    for name, transition_EE in graphs.items():
        chosen_T2 = smooth_logits(logits_TE, transition_EE).topk(TOP_K).indices
        shares[name][noise].append(share_right(chosen_T2, right_T2))


def _interval(values: Sequence[float]) -> dict[str, Any]:
    return dataclasses.asdict(t_interval(values))


def _gain(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    return _interval([a - b for a, b in zip(values, others, strict=True)])
