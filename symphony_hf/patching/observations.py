"""Observations of a stack's routers: of one forward, and summed over forwards."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Observations:
    """Sums over forwards of what a stack's routers observed.

    Args:
        routers: The routers, in layer order. Their number is L.
        num_experts: E.
        device: The graphs' device.

    Attributes:
        counts_LEE: Co-selections. Shape: (L, num_experts, num_experts), float32.
        tokens_L: Tokens counted. Shape: (L,), float32.
        losses_L3: Balance loss, z-loss, number of forwards. Shape: (L, 3), float32.
        skipped_L: Forwards left out of `counts_LEE` and `tokens_L`, as their logits were not finite. Shape: (L,).
    """

    def __init__(self, routers: Sequence[nn.Module], num_experts: int, device: torch.device) -> None:
        self.routers = list(routers)
        self.num_experts = num_experts
        # float32 by an explicit cast: DeepSpeed's zero.Init rewrites tensor constructors to its own dtype.
        self.counts_LEE = torch.zeros(len(self.routers), num_experts, num_experts, device=device).to(torch.float32)
        self.tokens_L = torch.zeros(len(self.routers), device=device).to(torch.float32)
        self.losses_L3 = torch.zeros(len(self.routers), 3, device=device).to(torch.float32)
        self.skipped_L = torch.zeros(len(self.routers), device=device).to(torch.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Observations":
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__init__([memo.get(id(r), r) for r in self.routers], self.num_experts, self.device)  # type: ignore[misc]
        for own, other in zip(copied._tensors, self._tensors, strict=True):
            own.copy_(other)
        return copied

    @property
    def device(self) -> torch.device:
        return self.counts_LEE.device

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.counts_LEE, self.tokens_L, self.losses_L3, self.skipped_L

    def counts_by_expert(self) -> Tensor:
        """Return how many tokens chose each expert, then how many there were. Shape: (L, num_experts + 1)."""
        return torch.cat([self.counts_LEE.diagonal(dim1=1, dim2=2), self.tokens_L.unsqueeze(1)], dim=1)

    def is_of(self, routers: Sequence[nn.Module]) -> bool:
        """Whether these are the observed routers, in this order."""
        return len(self.routers) == len(routers) and all(map(operator.is_, self.routers, routers))

    def zero(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything observed, or what was observed of some routers."""
        for tensor in self._tensors:
            if rows is None:
                tensor.zero_()
            else:
                tensor[list(rows)] = 0.0

    def skip_non_finite(self) -> None:
        """Leave out the counts of routers whose logits were not finite, which would spoil those of other forwards."""
        with torch.no_grad():
            finite_L = torch.isfinite(self.counts_LEE).all(2).all(1)
            self.counts_LEE.copy_(torch.where(finite_L.view(-1, 1, 1), self.counts_LEE, 0.0))
            self.tokens_L.copy_(torch.where(finite_L, self.tokens_L, 0.0))
            self.skipped_L.copy_(torch.where(finite_L, 0.0, 1.0))

    def add(self, other: "Observations") -> None:
        """Add what another has observed, router by router. Routers that are not in this one are left out."""
        if self.is_of(other.routers):
            with torch.no_grad():
                for own, added in zip(self._tensors, other._tensors, strict=True):
                    own.add_(added.to(self.device))
            return
        rows = {id(router): row for row, router in enumerate(other.routers)}
        for row, router in enumerate(self.routers):
            if id(router) in rows:
                with torch.no_grad():
                    for own, added in zip(self._tensors, other._tensors, strict=True):
                        own[row].add_(added[rows[id(router)]].to(self.device))


class ForwardRecord(Observations):
    """Observations of one training forward of a stack, with what its recomputation in the backward pass needs.

    Attributes:
        mask_T: The attention mask, flattened; None without one. Shape: (tokens,), bool.
        image_T: True for image tokens, if the model says so; None where all experts get all tokens.
        loads_LE: The load that the balance loss uses, where it is not this forward's own: the share of the tokens in
            `balance_scope` that chose each expert. Shape: (L, num_experts), float32.
        probabilities_LE: Mean probability of each expert, kept where `loads_LE` is used. Shape: (L, num_experts).
        visited: Rows of the routers that ran in this forward.
        closed: Whether the forward has ended. What runs after that is a recomputation.
    """

    def __init__(self, routers: Sequence[nn.Module], num_experts: int, device: torch.device) -> None:
        super().__init__(routers, num_experts, device)
        self.rows = {id(router): row for row, router in enumerate(self.routers)}
        self.mask_T: Tensor | None = None
        self.image_T: Tensor | None = None
        self.loads_LE = torch.zeros(len(self.routers), num_experts, device=device).to(torch.float32)
        self.probabilities_LE = torch.zeros_like(self.loads_LE)
        self.visited: set[int] = set()
        self.closed = False
        self.counted = False
        self.generation = 0

    def zero(self, rows: Sequence[int] | None = None) -> None:
        super().zero(rows)
        self.probabilities_LE.zero_()


def backward_starts(output: Any) -> list[Tensor]:
    """Return the tensors in a forward's output that its backward goes through, each once.

    Leaves, such as a trained prompt, are left out: all forwards share them.
    """
    if not isinstance(output, Tensor | dict | tuple | list):
        output = getattr(output, "__dict__", {})  # of a dataclass, or any object
    return list({id(tensor): tensor for tensor in _tensors_in(output) if tensor.grad_fn is not None}.values())


def in_backward() -> bool:
    """Whether a backward pass is under way, in which checkpointing runs a forward again."""
    return torch._C._current_graph_task_id() != -1


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors_in(value)
