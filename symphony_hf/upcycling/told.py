"""What an upcycling made, for a terminal."""

from rich.console import Console

from .pipeline import UpcycleResult


def print_result(result: UpcycleResult, console: Console | None = None) -> None:
    """Print what was made, and what the check saw."""
    console = console or Console()
    size = result.weight_bytes / 1e9
    speed = size / result.seconds_writing
    lines = [
        f"{result.model_type}, {result.parameters:,} parameters, experts in {len(result.layers)} layers",
        f"{size:.2f} GB in {result.files} files, {result.seconds_writing:.1f} seconds ({speed:.2f} GB/s)",
    ]
    if result.exactness is None:
        lines.append("not checked against the dense model")
    else:
        seen = result.exactness
        lines.append(
            f"checked on {seen.tokens} tokens: logits differ from the dense model's by {seen.difference:.2g} at most, "
            f"of {seen.largest:.3g} ({result.seconds_checking:.1f} seconds)"
        )
    for line in [*lines, *result.notes, f"Written to {result.target}"]:
        console.print(line, highlight=False, soft_wrap=True)
