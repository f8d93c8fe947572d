"""`symphony bench` and its kin: what the graph, its updates, upcycled experts and upcycling cost."""

from typing import Any

from symphony_hf.experiments.bench.commit import print_bench_commit, run_bench_commit
from symphony_hf.experiments.bench.experts import print_bench_experts, run_bench_experts
from symphony_hf.experiments.bench.layer import print_bench, run_bench
from symphony_hf.experiments.bench.upcycle import print_bench_upcycle, run_bench_upcycle

from .app import app, command_from


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b --tokens 1024 --output bench.json")
@command_from(run_bench, arguments=(), repeated=("models",))
def bench(result: dict[str, Any]) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    print_bench(result)


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
@command_from(run_bench_commit, left_out=("processes", "sizes"))
def bench_commit(result: dict[str, Any]) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce per optimizer step."""
    print_bench_commit(result)


@app.command("bench-experts", epilog="Example: symphony bench-experts --images 4 --output experts.json")
@command_from(run_bench_experts)
def bench_experts(result: dict[str, Any]) -> None:
    """Measure UpcycledMoE against a loop over experts, at the shapes of LLaVA's projector and CLIP's MLP."""
    print_bench_experts(result)


@app.command("bench-upcycle", epilog="Example: symphony bench-upcycle --output upcycle.json")
@command_from(run_bench_upcycle)
def bench_upcycle(result: dict[str, Any]) -> None:
    """Measure upcycling at Phi-3-mini's shapes: memory, and seconds next to a plain copy of the same size."""
    print_bench_upcycle(result)
