"""The same training in every arrangement: graphs to the bit, weights to rounding."""

import importlib.util
import io

import pytest
import torch
from rich.console import Console

from symphony_hf.training import invariance
from symphony_hf.training.invariance import ARRANGEMENTS, Arrangement, compare, print_comparisons, run

ONE_PROCESS = [name for name, (arrangement, _) in ARRANGEMENTS.items() if arrangement.ranks == 1]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers', of checkpointing and compiling


def test_arrangements_of_one_process():
    torch._dynamo.reset()
    comparisons = compare([name for name in ONE_PROCESS if name != "torch.compile"])
    assert [row.name for row in comparisons if not row.holds] == []
    assert not any(row.skipped for row in comparisons)


@pytest.mark.slow
def test_all_arrangements():
    """DeepSpeed's rows are skipped with a reason where it is not installed."""
    torch._dynamo.reset()
    comparisons = compare()
    assert [row for row in comparisons if not row.holds] == []
    installed = importlib.util.find_spec("deepspeed") is not None
    assert [row.name for row in comparisons if row.skipped] == (
        [] if installed else [n for n in ARRANGEMENTS if "ZeRO" in n]
    )


@pytest.mark.parametrize(
    "spoiled",
    [
        Arrangement(scope="local"),  # another loss
        Arrangement(accumulation=2, packed=False, scope="local"),
    ],
)
def test_a_difference_is_seen(spoiled, monkeypatch):
    monkeypatch.setitem(ARRANGEMENTS, "spoiled", (spoiled, "union batch"))
    (row,) = compare(["spoiled"])
    assert not row.holds
    assert row.weight_difference > 1e-3
    stream = io.StringIO()
    print_comparisons([row], Console(file=stream, width=160))
    assert "FAILS" in stream.getvalue()


def test_a_graph_that_counts_twice_is_seen(monkeypatch):
    """Counting a recomputation, or a micro-batch more, must show in the graphs."""
    original = invariance.micro_batches

    def one_more(arrangement, step, rank):
        batches = list(original(arrangement, step, rank))
        return batches if arrangement.accumulation == 1 else [*batches[:-1], batches[0]]

    monkeypatch.setattr(invariance, "micro_batches", one_more)
    (row,) = compare(["accumulation 2"])
    assert not row.graphs_equal
    assert not row.holds


def test_local_balance_is_the_mean_over_micro_batches_and_not_the_unions():
    union, parts = (run(Arrangement(scope="local", accumulation=n)) for n in (1, 2))
    assert (union.weights - parts.weights).abs().max() > 1e-6


def test_deepspeed_that_is_not_installed_is_a_reason(monkeypatch):
    monkeypatch.setattr(invariance.importlib.util, "find_spec", lambda name: None)
    (row,) = compare(["ZeRO-2, 2 ranks"])
    assert row.holds
    assert "pip install" in row.skipped
