"""`symphony upcycle`."""

import re
from typing import Annotated

import typer

from .app import app

_NUMBERS = re.compile(r"\d+(\s*,\s*\d+)*")


@app.command(
    epilog="Example: symphony upcycle microsoft/Phi-3-mini-4k-instruct phi3-smoe-7.4b --to qwen2_moe --num_experts 4 "
    "--layers every-other"
)
def upcycle(
    source: Annotated[str, typer.Argument(help="The dense checkpoint: a folder, or its name on the Hub.")],
    target: Annotated[str, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str | None, typer.Option(help="mixtral, qwen2_moe, qwen3_moe or granitemoe; what fits the source by default.")
    ] = None,
    num_experts: Annotated[int, typer.Option("--num_experts", help="Copies of each MLP.")] = 8,
    top_k: Annotated[int, typer.Option("--top_k", help="Experts that compute a token.")] = 2,
    layers: Annotated[
        str, typer.Option(help="all, every-other, or numbers from 0 with commas: whose MLPs become experts.")
    ] = "all",
    router_std: Annotated[float, typer.Option("--router_std", help="Deviation of the routers' weights.")] = 0.02,
    router_init: Annotated[str, typer.Option("--router_init", help="normal or uniform.")] = "normal",
    seed: Annotated[int, typer.Option(help="Of routers and noise.")] = 0,
    noise: Annotated[float, typer.Option(help="On the copies, relative; above 0 nothing can be checked.")] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="Cast to float32, bfloat16 or float16.")] = None,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Of a file.")] = "5GB",
    check: Annotated[bool, typer.Option(help="Compare both models' logits, a layer in memory at a time.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a model in the target, once the new is whole.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Make a MoE of a dense checkpoint, from file to file: each expert begins as a copy of the MLP."""
    from ..upcycling import print_result
    from ..upcycling import upcycle as run

    result = run(
        source,
        target,
        to=to,
        num_experts=num_experts,
        top_k=top_k,
        layers=[int(n) for n in layers.split(",")] if _NUMBERS.fullmatch(layers) else layers,
        router_std=router_std,
        router_init=router_init,
        seed=seed,
        noise=noise,
        dtype=dtype,
        max_shard_size=max_shard_size,
        check=check,
        overwrite=overwrite,
        revision=revision,
    )
    print_result(result)


@app.command("bench-upcycle", epilog="Example: symphony bench-upcycle --output upcycle.json")
def bench_upcycle(
    folder: Annotated[str, typer.Option(help="Where the checkpoints are written, and deleted again: 40 GB.")] = ".",
    shrink: Annotated[int, typer.Option(help="Divide Phi-3-mini's widths by this, to try it out.")] = 1,
    rounds: Annotated[int, typer.Option(help="Upcyclings and plain copies, in alternation.")] = 2,
    output: Annotated[str, typer.Option(help="Where the JSON goes.")] = "symphony-bench-upcycle.json",
) -> None:
    """Measure upcycling at Phi-3-mini's shapes: memory, and seconds beside a plain copy of as many bytes."""
    from ..bench_upcycle import print_bench_upcycle, run_bench_upcycle

    print_bench_upcycle(run_bench_upcycle(folder, shrink=shrink, rounds=rounds, output=output))
