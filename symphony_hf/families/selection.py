"""How many experts a block chooses with its gate's logits: seen by running a twin of the block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedModelError
from .substitution import linear_of
from .twin import full_shape, normal, random_like, twin

_NUM_TOKENS = 24
_LARGEST = 2**22
"""Elements of the largest tensor that gets numbers in a block's twin: gates are small, and come before the experts."""
_HOW = "if its highest logits choose, give `routers=` a pattern of its name and `top_k=` the number of experts"


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


def infer_top_k(where: str, block: nn.Module, path: str) -> int:
    """The number of experts that a block chooses by the highest logits of its gate.

    Args:
        where: The gate, for error messages.
        block: The module whose forward uses the gate's logits.
        path: Of the gate's linear map in it.

    Raises:
        UnsupportedModelError: If the block's forward does not run on hidden states alone, or makes no top-k over the
            experts, or one of something else than its gate's logits.
    """
    generator = torch.Generator().manual_seed(0)
    number = random_like(generator, torch.float32)
    meta = torch.device("meta")

    def make(tensor: Tensor) -> Tensor:
        small = torch.Size(full_shape(tensor)).numel() <= _LARGEST
        return number(tensor) if small else torch.empty(full_shape(tensor), dtype=torch.float32, device=meta)

    copied = twin(block, make)
    gate = linear_of(copied, path)
    num_experts, hidden_size = gate.weight.shape  # type: ignore[union-attr, misc]
    seen: list[Tensor] = []
    gate.register_forward_hook(lambda module, args, logits: seen.append(logits.detach().clone()))
    hidden = normal((1, _NUM_TOKENS, int(hidden_size)), generator)
    problems = []
    for shaped in (hidden, hidden[0]):
        seen.clear()
        try:
            with torch.no_grad(), torch.device("cpu"), _SelectionSpy(num_experts):  # type: ignore[arg-type]
                type(block).forward(copied, shaped)
            problems.append("it makes no top-k over the experts")
        except _Chosen as chosen:
            return _checked(where, chosen, seen)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            problems.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModelError(
        f"{where}: how its block {type(block).__name__} chooses experts could not be seen by running it on hidden "
        f"states ({problems[0]}); {_HOW}"
    )


def _checked(where: str, chosen: _Chosen, seen: list[Tensor]) -> int:
    if not seen:
        raise UnsupportedModelError(f"{where}: its block chooses without calling it; {_HOW}")
    logits = seen[-1].reshape(-1, seen[-1].shape[-1]).float()
    picked = chosen.scores.reshape(logits.shape).topk(chosen.top_k).indices.sort(-1).values
    if not torch.equal(picked, logits.topk(chosen.top_k).indices.sort(-1).values):
        raise UnsupportedModelError(
            f"{where}: its block does not choose by the highest logits of its gate (bias, noise, groups?); {_HOW}"
        )
    return chosen.top_k
