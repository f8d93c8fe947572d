"""Each expert's load at every log of a run, kept beside its checkpoints."""

import itertools
import statistics
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import SymphonyWarning
from ..unfinished import replacing


class LoadHistory:
    """Loads by step: at most `MOST` moments, evenly spread. Every second is dropped when there are more.

    Attributes:
        steps: Of the moments, increasing.
        loads: By router, one tensor a moment: shares that sum to 1, float32, on the CPU. Shape of each: (num_experts,).
    """

    MOST = 256

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.loads: dict[str, list[Tensor]] = {}

    def add(self, step: int, graphs: Mapping[str, Tensor]) -> None:
        """Take the loads of graphs that were learned up to a step, in place of what is there of later ones."""
        self.cut(step - 1)
        if len(self.steps) > 2 and self.steps[-1] - self.steps[-2] < self._gap():
            self._keep(slice(-1))  # the last one so far was there as the last one alone
        self.steps.append(step)
        for name, adjacency_EE in graphs.items():
            load_E = adjacency_EE.diagonal().float()
            self.loads.setdefault(name, []).append((load_E / load_E.sum()).cpu())
        if len(self.steps) > self.MOST:
            self._keep(slice((len(self.steps) - 1) % 2, None, 2))  # the last one is among them

    def _gap(self) -> float:
        """Between two moments, the last of which may be nearer."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.steps[:-1]))

    def _keep(self, which: slice) -> None:
        self.steps = self.steps[which]
        self.loads = {name: rows[which] for name, rows in self.loads.items()}

    def cut(self, step: int) -> None:
        """Forget what came after a step."""
        self._keep(slice(sum(own <= step for own in self.steps)))

    def write(self, path: Path) -> None:
        """Write it so that a reader finds the old file or the whole new one."""
        tensors = {f"load/{name}": torch.stack(rows) for name, rows in self.loads.items()}
        with replacing(path) as written:
            written.write_bytes(save({"steps": torch.tensor(self.steps), **tensors}))

    @classmethod
    def read(cls, path: Path) -> "LoadHistory":
        """What was written.

        Warns:
            SymphonyWarning: If the file is damaged; it is then empty.
        """
        history = cls()
        try:
            tensors = load(path.read_bytes())
            history.steps = tensors.pop("steps").tolist()
        except (SafetensorError, KeyError) as error:
            warnings.warn(f"{path}: damaged, so loads are kept from here on ({error})", SymphonyWarning, stacklevel=2)
            return cls()
        history.loads = {name.removeprefix("load/"): list(rows) for name, rows in tensors.items()}
        return history
