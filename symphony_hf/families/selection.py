"""How many experts a block chooses with its gate's logits: seen by running a twin of the block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .probe import NUM_TOKENS, WRONG_INPUT
from .substitution import linear_of
from .twin import full_shape, normal, random_like, same_draws, twin

_LARGEST = 2**22
"""Elements of the largest tensor that gets numbers in a block's twin: gates are small, and come before the experts."""
HOW = "if its highest logits choose, give `routers=` a pattern of its name and `top_k=` the number of experts"


class _Chosen(Exception):
    """Ends a block's forward as soon as it has chosen: the experts need not run."""

    def __init__(self, scores: Tensor, top_k: int) -> None:
        self.scores, self.top_k = scores, top_k


class _SelectionSpy(TorchFunctionMode):
    """Waits for a top-k over a number of experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            top_k = args[1] if len(args) > 1 else kwargs["k"]
            if scores.shape[-1] == self.num_experts and not scores.is_meta:
                raise _Chosen(scores, top_k)
        return func(*args, **kwargs)


class BlockRun:
    """What a twin of a block does with its gate's logits, on random hidden states.

    Args:
        where: The gate, for error messages.
        block: The module whose forward uses the gate's logits.
        path: Of the gate's linear map in it.

    Attributes:
        logits: What the gate returned when it was last called; None where it was not called.
        chosen: The scores that the block took the highest of, and how many; None where it was not seen to.
        problem: Why not.
    """

    def __init__(self, where: str, block: nn.Module, path: str) -> None:
        self.where, self.block = where, block
        generator = torch.Generator().manual_seed(0)
        copied = twin(block, _numbers_for_small(generator))
        gate = linear_of(copied, path)
        num_experts, hidden_size = (int(size) for size in gate.weight.shape)  # type: ignore[union-attr]
        gate.register_forward_hook(self._note_logits)
        hidden = normal((1, NUM_TOKENS, hidden_size), generator)
        for shaped in (hidden[0], hidden):  # the last one's problem is told
            self.logits: Tensor | None = None
            self.chosen: _Chosen | None = None
            self.problem = "it makes no top-k over the experts"
            self.finished = False
            try:
                with same_draws(), _SelectionSpy(num_experts):
                    type(block).forward(copied, shaped)
                self.finished = True
            except _Chosen as chosen:
                self.chosen = chosen
                return
            except WRONG_INPUT as error:
                self.problem = f"{type(error).__name__}: {error}"

    def _note_logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.logits = output.detach().clone().float()

    def check_gate_is_called(self) -> None:
        """Refuse a block that reads its gate's weight itself: the gate, patched, would be gone past."""
        if self.logits is None and (self.finished or self.chosen is not None):
            raise UnsupportedModelError(
                f"{self.where}: its block {type(self.block).__name__} does not call it, but reads its weight itself: "
                "give `routers=` a pattern of the block's name instead"
            )

    def top_k(self) -> int:
        """How many experts the block chooses, by the highest logits of its gate.

        Raises:
            UnsupportedModelError: If that could not be seen, or it chooses by something else.
        """
        self.check_gate_is_called()
        if self.chosen is None or self.logits is None:
            raise UnsupportedModelError(
                f"{self.where}: how its block {type(self.block).__name__} chooses experts could not be seen by running "
                f"it on hidden states ({self.problem}); {HOW}"
            )
        logits, top_k = self.logits.reshape(-1, self.logits.shape[-1]), self.chosen.top_k
        picked = self.chosen.scores.reshape(logits.shape).topk(top_k).indices.sort(-1).values
        if not torch.equal(picked, logits.topk(top_k).indices.sort(-1).values):
            raise UnsupportedModelError(
                f"{self.where}: its block does not choose by the highest logits of its gate (bias, noise, groups?); "
                f"{HOW}"
            )
        return top_k


def _numbers_for_small(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    number = random_like(generator, torch.float32)

    def make(tensor: Tensor) -> Tensor:
        shape = full_shape(tensor)
        if torch.Size(shape).numel() <= _LARGEST:
            return number(tensor)
        return torch.empty(shape, dtype=torch.float32, device="meta")

    return make
