"""The same training in every arrangement: graphs to the bit, weights to rounding."""

import dataclasses
import importlib.util
import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.errors import ConfigError
from symphony_hf.experiments.distributed import invariance
from symphony_hf.experiments.distributed.arrangements import ARRANGEMENTS, UNION, Arrangement
from symphony_hf.experiments.distributed.invariance import (
    Comparison,
    Trace,
    check_distributed,
    compare,
    print_comparisons,
    run,
)

ONE_PROCESS = [name for name, (arrangement, _) in ARRANGEMENTS.items() if arrangement.ranks == 1]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers', of checkpointing and compiling


@pytest.mark.thorough
def test_arrangements_of_one_process():
    torch._dynamo.reset()
    comparisons = compare([name for name in ONE_PROCESS if "torch.compile" not in name])
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


def test_every_arrangement_is_there():
    """One of each, whatever else is in the table."""
    present = [arrangement for arrangement, _ in ARRANGEMENTS.values()]
    for accumulation in (2, 4, 8):
        assert Arrangement(accumulation=accumulation) in present
    for stage in (1, 2, 3):
        assert Arrangement(ranks=2, zero=stage) in present
        assert any(a.zero == stage and a.offload and a.ranks == 2 for a in present)
    for checkpointing in ("reentrant", "non-reentrant"):
        assert Arrangement(checkpointing=checkpointing) in present
    assert {Arrangement(ranks=2), Arrangement(packed=True), Arrangement(compiled=True)} <= set(present)
    for zero in (None, 2, 3):
        for scope in ("local", "global"):
            assert Arrangement(ranks=2, zero=zero, scope=scope) in present
        assert Arrangement(ranks=2, zero=zero, scope="step", accumulation=2) in present
        for kind in ("moves_bias", "replays"):
            assert Arrangement(ranks=2, zero=zero, **{kind: True}) in present


@pytest.mark.thorough
@pytest.mark.parametrize(
    "spoiled",
    [
        Arrangement(scope="local"),  # another loss
        Arrangement(accumulation=2, packed=False, scope="local"),
        Arrangement(z_loss_weight=0.0101),
        Arrangement(accumulation=2, z_loss_weight=0.02),  # as many times as there are micro-batches
    ],
)
def test_a_difference_is_seen(spoiled, monkeypatch):
    monkeypatch.setitem(ARRANGEMENTS, "spoiled", (spoiled, UNION))
    (row,) = compare(["spoiled"])
    assert not row.holds
    assert row.gradient_difference > 1e-3
    stream = io.StringIO()
    print_comparisons([row], Console(file=stream, width=160))
    assert "FAILS" in stream.getvalue()


@pytest.mark.parametrize("part", ["model.layers.0.mlp.gate.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_gradient_that_differs_on_one_rank_in_one_step_is_seen(part):
    reference = run(Arrangement())
    other = Trace(reference.graphs, reference.weights, {n: g.clone() for n, g in reference.gradients.items()})
    other.gradients[part][5] *= 1 + 3e-5
    assert invariance._compare(UNION, [reference, reference], reference).holds
    assert not invariance._compare(UNION, [reference, other], reference).holds
    del other.gradients[part]
    assert not invariance._compare(UNION, [other, reference], reference).holds


@pytest.mark.parametrize("spoiled", ["gradients", "weights"])
def test_a_value_that_is_not_a_number_is_seen(spoiled):
    """Also where Python's `max` drops it: after the first parameter, and on the second rank."""
    reference = run(Arrangement())
    other = dataclasses.replace(
        reference, weights=reference.weights.clone(), gradients={n: g.clone() for n, g in reference.gradients.items()}
    )
    wrong = other.gradients["lm_head.weight"] if spoiled == "gradients" else other.weights
    wrong[-1] = float("nan")
    assert not invariance._compare(UNION, [reference, other], reference).holds


def test_a_check_that_compares_nothing_fails(monkeypatch):
    monkeypatch.setattr(invariance, "_why_not", lambda arrangement: "DeepSpeed is not installed")
    assert CliRunner().invoke(app, ["check", "distributed", "--only", "ZeRO-2"]).exit_code == 1


def test_references_alone_are_refused(monkeypatch):
    """Each would be compared with itself."""
    monkeypatch.setattr(invariance, "compare", lambda names: pytest.fail("it began"))
    for only in ("union batch", "UNION BATCH, LOCAL"):
        with pytest.raises(ConfigError, match=f"no arrangement with a reference has '{only}' in its name"):
            check_distributed(only)


def test_the_cross_entropy_and_the_z_loss_both_weigh():
    """Each part of the gradient is larger than rounding, so that neither can hide behind it."""
    both, entropy = run(Arrangement()).gradients, run(Arrangement(z_loss_weight=0.0)).gradients
    assert both.keys() == entropy.keys()
    for name in both:
        largest = both[name][0].abs().max()
        assert entropy[name][0].abs().max() > 1e-3 * largest
        # The last layer's experts and what comes after them are behind every router.
        is_behind = name in ("lm_head.weight", "model.norm.weight") or "layers.1.mlp.experts" in name
        assert is_behind or (both[name][0] - entropy[name][0]).abs().max() > 1e-2 * largest, name


def test_the_command_prints_the_table_and_fails_where_a_row_does(monkeypatch):
    def check(only):
        result = CliRunner().invoke(app, ["check", "distributed", "--only", only])
        return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"

    row = Comparison("packed", UNION, graphs_equal=True, gradient_difference=0.0, weight_difference=0.0)
    monkeypatch.setattr(invariance, "compare", lambda names: [dataclasses.replace(row, name=name) for name in names])
    code, printed = check("accumulation 4")
    assert code == 0
    assert "same bits" in printed
    monkeypatch.setattr(invariance, "compare", lambda names: [row, dataclasses.replace(row, gradient_difference=1e-3)])
    code, printed = check("packed")
    assert code == 1
    assert "FAILS" in printed
    assert "no arrangement with a reference has 'nothing'" in check("nothing")[1]


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


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("field", "setting"), [("moves_bias", True), ("replays", True), ("scope", "step"), ("scope", "last_step")]
)
def test_rows_of_a_setting_are_not_those_without_it(field, setting):
    """A bias that did not move, choices that were the model's own, or a load of one micro-batch would show nothing."""
    first = Arrangement(scope="local", accumulation=2) if field == "scope" else Arrangement()
    other = dataclasses.replace(first, **{field: setting})
    if field == "moves_bias":
        biases = run(other).graphs[:, -16:]
        assert (biases[1:] != biases[:-1]).any(1).all()
        return
    graphs, others = run(first).graphs, run(other).graphs
    assert not torch.equal(graphs, others)
    if setting == "last_step":
        assert not torch.equal(others, run(Arrangement(accumulation=2)).graphs)


def test_deepspeed_that_is_not_installed_is_a_reason(monkeypatch):
    monkeypatch.setattr(invariance.importlib.util, "find_spec", lambda name: None)
    (row,) = compare(["ZeRO-2, 2 ranks"])
    assert row.holds
    assert "pip install" in row.skipped
