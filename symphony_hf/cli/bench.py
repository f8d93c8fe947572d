"""`symphony bench`, `bench-commit` and `bench-experts`."""

from typing import Annotated

import typer

from .app import app


@app.command(epilog="Example: symphony bench --models olmoe-1b-7b --tokens 1024 --output bench.json")
def bench(
    models: Annotated[
        list[str] | None,
        typer.Option(help="mixtral-8x7b, olmoe-1b-7b or qwen3-30b-a3b; several times for several; all by default."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of one forward.")] = 1024,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the accelerator where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; float32 on CPU, else bfloat16.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each row, after warm-up.")] = 60.0,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench.json",
) -> None:
    """Measure what the graph costs: a Symphony block against the stock one, in alternation, at true layer shapes."""
    from ..bench import print_bench, run_bench

    print_bench(run_bench(models or None, tokens=tokens, device=device, dtype=dtype, seconds=seconds, output=output))


@app.command("bench-commit", epilog="Example: symphony bench-commit --output commit.json")
def bench_commit(
    seconds: Annotated[float, typer.Option(help="Time for the training step that commits are set beside.")] = 20.0,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench-commit.json",
) -> None:
    """Measure what moving the graphs costs with 1, 2 and 4 processes: one all-reduce an optimizer step."""
    from ..bench_commit import print_bench_commit, run_bench_commit

    print_bench_commit(run_bench_commit(output, seconds))


@app.command("bench-experts", epilog="Example: symphony bench-experts --images 4 --output experts.json")
def bench_experts(
    images: Annotated[int, typer.Option(help="Whose tokens make one step.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the accelerator where there is one.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each row, after warm-up.")] = 30.0,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench-experts.json",
) -> None:
    """Measure UpcycledMoE against a loop over experts, at the shapes of LLaVA's projector and CLIP's MLP."""
    from ..bench_experts import print_bench_experts, run_bench_experts

    print_bench_experts(run_bench_experts(output, images=images, device=device, seconds=seconds))
