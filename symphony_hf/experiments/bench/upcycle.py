"""`symphony bench-upcycle`: upcycling at Phi-3-mini's true shapes, compared with a plain copy of as many bytes.

The dense checkpoint has seeded random values. Each upcycling runs in a process of its own, and its peak resident memory
is reported. Both read what the disk holds and memory does not, and flush their files to the disk.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Phi3Config

from symphony_hf.errors import ConfigError, EvaluationError, SymphonyError
from symphony_hf.results import check_file_place
from symphony_hf.tables import Table, TableCell

from .results import number_cell, print_result, range_cell, write_result
from .timing import quartiles

_SHARD_LAYERS = 4
_SETTINGS = {"to": "qwen2_moe", "num_experts": 4, "top_k": 2, "layers": "every-other"}
_REASON = "reason"


def run_bench_upcycle(
    folder: str | Path = ".", *, shrink: int = 1, rounds: int = 5, output: str | Path = "symphony-bench-upcycle.json"
) -> dict[str, Any]:
    """Measure upcycling and copying, and write the result as JSON.

    Args:
        folder: Folder for the checkpoints; they are written to a temporary folder in it.
        shrink: Divisor of Phi-3-mini's widths, heads and vocabulary; 1 for its true shapes.
        rounds: Number of upcyclings and copies, in alternation.
        output: Path of the JSON file.

    Returns:
        Seconds, bytes and peak memory of each, and the ratio within each round; a copy over a copy is the noise.

    Raises:
        ConfigError: If a number is out of range, or the folder does not exist.
        EvaluationError: If an upcycling fails.
    """
    check_file_place(output, "bench-upcycle")
    check_scratch("bench-upcycle", folder, shrink)
    if rounds < 1:
        raise ConfigError(f"bench-upcycle: `rounds` must be at least 1, got {rounds}")
    with tempfile.TemporaryDirectory(prefix="symphony-bench-", dir=folder) as scratch:
        dense, target = Path(scratch) / "dense", Path(scratch) / "upcycled"
        dense_bytes = write_random_phi3(dense, shrink)
        runs: list[dict[str, Any]] = []
        copies: list[float] = []
        again: list[float] = []
        for number in tqdm(range(rounds), desc="bench-upcycle", unit=" rounds", disable=None):
            shutil.rmtree(target, ignore_errors=True)
            _settle(dense)
            runs.append(_upcycle(dense, target, check=number == 0))
            copies.append(_copy(target, Path(scratch) / "copy"))
            again.append(_copy(target, Path(scratch) / "copy"))
    seconds = [run["seconds_writing"] for run in runs]
    size = runs[0]["weight_bytes"]
    values = {
        "shapes": "Phi-3-mini" if shrink == 1 else f"Phi-3-mini / {shrink}",
        "settings": _SETTINGS,
        "dense_bytes": dense_bytes,
        "bytes": size,
        "parameters": runs[0]["parameters"],
        "seconds": seconds,
        "seconds_of_a_copy": copies,
        "seconds_of_the_copy_again": again,
        "ratio": _over(seconds, copies),
        "noise": _over(again, copies),
        "bytes_per_second": size / float(np.median(seconds)),
        "bytes_per_second_of_a_copy": size / float(np.median(copies)),
        # The first run also checks; with one round, none has been measured without the check.
        "peak_memory_bytes": max((run["peak_memory_bytes"] for run in runs[1:]), default=None),
        "peak_memory_bytes_with_check": runs[0]["peak_memory_bytes"],
        "check": {"seconds": runs[0]["seconds_checking"], **runs[0]["exactness"]},
    }
    return write_result(output, values)


def _over(seconds: list[float], copies: list[float]) -> dict[str, float]:
    """Return the median ratio within a round, and its quartiles."""
    ratios = [one / other for one, other in zip(seconds, copies, strict=True)]
    return dict(zip(("low", "median", "high"), quartiles(ratios), strict=True))


def check_scratch(command: str, folder: str | Path, shrink: int) -> None:
    """Check the folder for the checkpoints and the divisor of the shapes.

    Raises:
        ConfigError: If the folder does not exist, or the heads cannot be divided by `shrink`.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{command}: `folder` is {str(folder)!r}, which is no folder: give an existing one")
    heads = Phi3Config().num_attention_heads
    if shrink < 1 or heads % shrink:
        raise ConfigError(f"{command}: `shrink` must divide Phi-3-mini's {heads} heads, got {shrink}")


def write_random_phi3(folder: Path, shrink: int = 1) -> int:
    """Write a bfloat16 checkpoint of Phi-3-mini's shapes with seeded random values, in shards. Returns its bytes."""
    default = Phi3Config()
    config = Phi3Config(
        vocab_size=default.vocab_size // shrink,
        hidden_size=default.hidden_size // shrink,
        intermediate_size=default.intermediate_size // shrink,
        num_attention_heads=default.num_attention_heads // shrink,
        num_key_value_heads=default.num_attention_heads // shrink,
        pad_token_id=0,
    )
    config.architectures, config.dtype = ["Phi3ForCausalLM"], torch.bfloat16
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: dict[int, list[str]] = {}
    for name in shapes:
        layer = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault(int(layer[1]) // _SHARD_LAYERS if layer else 0, []).append(name)
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    for number, names in tqdm(shards.items(), desc="writing the dense checkpoint", unit=" files", disable=None):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(shapes[name], name, generator) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _random(shape: torch.Size, name: str, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _upcycle(dense: Path, target: Path, check: bool) -> dict[str, Any]:
    arguments = {"source": str(dense), "target": str(target), "check": check, **_SETTINGS}
    return run_alone("bench-upcycle", "symphony_hf.experiments.bench.upcycle", json.dumps(arguments))


def run_alone(command: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own, and return the values that it passes to `report`.

    Raises:
        EvaluationError: If the process fails, with its reason if it has reported one.
    """
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:  # its traceback, if any, went to this terminal
        raise EvaluationError(
            f"{command}: a process ended with exit code {done.returncode}: the reason is printed above, unless it was "
            "killed, for instance for lack of memory"
        )
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if _REASON in values:
        raise EvaluationError(values[_REASON])
    return values


def report(measure: Callable[[], dict[str, Any]]) -> None:
    """Print the measured values, or the reason for an error, as the last line: the counterpart of `run_alone`."""
    try:
        values = measure()
    except SymphonyError as error:
        values = {_REASON: str(error)}
    print(json.dumps(values))


def _settle(source: Path) -> None:
    """Wait for the disk, and let it forget what will be read.

    What was written or deleted before is not flushed in the time of what follows, and a copy of files that were just
    written does not read them from memory where upcycling reads its own from the disk.
    """
    if hasattr(os, "sync"):
        os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in source.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(source: Path, target: Path) -> float:
    _settle(source)
    started = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb+") as copied:
            os.fsync(copied.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def print_bench_upcycle(result: dict[str, Any], console: Console | None = None) -> None:
    """Print upcycling beside the copy, and the path of the file."""
    rows: list[list[TableCell | str]] = [
        ["seconds", *(_seconds(result[name]) for name in ("seconds", "seconds_of_a_copy"))],
        [
            f"{result['bytes'] / 1e9:.2f} GB",
            *(number_cell(result[f"bytes_per_second{of}"] / 1e9, ".2f", " GB/s") for of in ("", "_of_a_copy")),
        ],
        ["over a copy, and quartiles", *_ratio_cells(result["ratio"])],
        ["a copy over a copy", *_ratio_cells(result["noise"])],
        ["peak memory", _gigabytes(result["peak_memory_bytes"]), ""],
        ["with the check", _gigabytes(result["peak_memory_bytes_with_check"]), ""],
    ]
    title = f"{result['shapes']}, {result['parameters']:,} parameters"
    print_result(result, [Table(title, ["", "upcycling", "plain copy"], rows)], console)


def _ratio_cells(ratio: dict[str, float]) -> tuple[TableCell, TableCell]:
    return number_cell(ratio["median"], ".3f"), range_cell(ratio["low"], ratio["high"], ".3f")


def _gigabytes(size: int | None) -> TableCell | str:
    return "" if size is None else number_cell(size / 1e9, ".2f", " GB")


def _seconds(values: list[float]) -> TableCell:
    return TableCell(", ".join(f"{value:.1f}" for value in values), float(np.median(values)))


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss starts at the parent's memory when it forked
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measure() -> dict[str, Any]:
    from symphony_hf.conversion.upcycling.upcycle import upcycle

    result = upcycle(**json.loads(sys.argv[1]))
    found = result.exactness
    exactness = {} if found is None else {name: getattr(found, name) for name in ("difference", "largest", "tokens")}
    return {
        "seconds_writing": result.seconds_writing,
        "seconds_checking": result.seconds_checking,
        "weight_bytes": result.weight_bytes,
        "parameters": result.parameters,
        "exactness": exactness,
        "peak_memory_bytes": peak_memory(),
    }


if __name__ == "__main__":
    report(_measure)
