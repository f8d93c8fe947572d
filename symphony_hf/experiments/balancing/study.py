"""The runs of `symphony balance`, its result file and its tables."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm
from transformers.utils import logging

from symphony_hf.evaluation.statistics import interval_text, t_interval
from symphony_hf.experiments.bench.results import print_result, write_result
from symphony_hf.results import check_file_place
from symphony_hf.settings import check_least
from symphony_hf.tables import Table, TableCell

from .domains import two_domains
from .training import LENGTH, ROWS, train_and_measure

SCOPES: dict[str, dict[str, Any]] = {
    "none": {"balance_loss_weight": 0.0},
    "local": {"balance_scope": "local"},
    "step": {"balance_scope": "step"},
    "last_step": {"balance_scope": "last_step"},
}
"""Settings by the scope of the balance loss, for an OLMoE whose experts begin as specialists of a domain."""

BALANCES: dict[str, dict[str, Any]] = {
    "neither": {"balance_loss_weight": 0.0},
    "loss": {"balance_scope": "local"},
    "bias": {"balance": "bias"},
}
"""Settings by way to balance, for families with a correction bias."""

BIAS_FAMILIES = ("deepseek_v3", "glm4_moe")
_BIAS_MICRO_BATCHES = 2
"""One of each domain, so that the scope of the loss matters little where it is compared with the bias."""

_MEASURES = {
    "violation": "violation",
    "last_violation": "of the last quarter",
    "information_before": "information before",
    "information": "information after",
    "loss": "held-out loss",
}
"""Titles of the measures' columns."""


def run_balance(
    output: str | Path = "symphony-balance.json", seeds: int = 3, steps: int = 200, micro_batches: int = 8
) -> dict[str, Any]:
    """Train small models with each way to balance, and write the result as JSON.

    Args:
        output: Path of the JSON file.
        seeds: Number of seeds of weights and rows, from 0.
        steps: Number of optimizer steps of a run.
        micro_batches: Number of micro-batches of a step, which alternate between code and prose, for the scopes; it is
            2 for the bias.

    Returns:
        The measurements, their settings and the machine.
    """
    check_least("symphony balance", 1, seeds=seeds, steps=steps, micro_batches=micro_batches)
    check_file_place(output, "balance")
    logging.set_verbosity_error()
    domains = two_domains()
    forms = [("olmoe", form, micro_batches, settings) for form, settings in SCOPES.items()]
    forms += [(family, form, _BIAS_MICRO_BATCHES, BALANCES[form]) for family in BIAS_FAMILIES for form in BALANCES]
    rows = []
    with tqdm(total=seeds * len(forms), desc="balance", unit="run", disable=None) as bar:
        for family, form, number, settings in forms:
            runs = []
            for seed in range(seeds):
                sizes = {"seed": seed, "steps": steps, "micro_batches": number}
                specialists = family not in BIAS_FAMILIES
                runs.append(train_and_measure(family, settings, domains, **sizes, specialists=specialists))
                bar.update()
            rows.append({"family": family, "balance": form, "micro_batches": number, "runs": runs, **_intervals(runs)})
    return write_result(
        output,
        {
            "rows": rows,
            "seeds": seeds,
            "steps": steps,
            "tokens_of_micro_batch": ROWS * LENGTH,
        },
    )


def _intervals(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {name: dataclasses.asdict(t_interval([run[name] for run in runs])) for name in _MEASURES}


def balance_table(result: Mapping[str, Any], families: tuple[str, ...], title: str) -> Table:
    """Return the rows of some families as a table, with 95% intervals over seeds."""
    header = ["family", "balance", *_MEASURES.values()]
    rows: list[list[TableCell | str]] = [
        [
            row["family"],
            row["balance"],
            *(TableCell(interval_text(row[name], 3), row[name]["estimate"]) for name in _MEASURES),
        ]
        for row in result["rows"]
        if row["family"] in families
    ]
    return Table(title, header, rows)


def print_balance(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the two tables of a result, and the path of its file."""
    of_seeds = f"{result['seeds']} seeds, {result['steps']} steps"
    tables = [
        balance_table(result, ("olmoe",), f"Scope of the balance loss: {of_seeds}"),
        balance_table(result, BIAS_FAMILIES, f"Balancing by a loss or by the correction bias: {of_seeds}"),
    ]
    print_result(result, tables, console)
