"""How many experts a block chooses with its gate's logits: seen by running a twin of the block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from symphony_hf.errors import UnsupportedModelError

from .probe import NUM_TOKENS, WRONG_INPUT, full_shape, normal, random_like, same_draws, twin
from .substitution import linear_of

HOW = "if its highest logits choose, give `routers=` a pattern of its name and `top_k=` the number of experts"


class Choice(NamedTuple):
    """A top-k selection of a block. The scores' shape: (tokens, number of candidates)."""

    scores: Tensor
    top_k: int
    takes_highest: bool


class _SelectionSpy(TorchFunctionMode):
    """Records every top-k over as many rows as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, Tensor.topk):
            self._note(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _note(
        self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, out: Any = None
    ) -> None:
        if input.is_meta or input.numel() == 0:
            return
        along_experts = dim in (-1, input.dim() - 1)
        if not along_experts or input.numel() == NUM_TOKENS * input.shape[-1]:
            self.choices.append(Choice(input.detach().reshape(-1, input.shape[-1]), k, largest and along_experts))


class _BlockRun:
    """One run of a block's twin on random hidden states.

    Attributes:
        logits: What the gate returned when it was last called; None where it was not called.
        choices: Every top-k over tokens that the block made.
        finished: Whether its forward came to an end. Experts without numbers end it before, which is no harm.
        problem: What ended it.
    """

    def __init__(self, block: nn.Module, path: str, hidden: Tensor, training: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        copied = twin(block, _numbers_but_for_experts(block, linear_of(block, path), generator), training)
        self.logits: Tensor | None = None
        self.finished, self.problem = False, "it does not call the gate"
        linear_of(copied, path).register_forward_hook(self._note_logits)
        spy = _SelectionSpy()
        try:
            with same_draws(), spy:
                type(block).forward(copied, hidden)
            self.finished = True
        except WRONG_INPUT as error:
            self.problem = f"{type(error).__name__}: {error}"
        self.choices = spy.choices

    def _note_logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.logits = output.detach().clone().float().reshape(-1, output.shape[-1])

    def top_k(self) -> int | None:
        """The number of experts in all choices if they agree and are of the gate's highest logits, else None."""
        if self.logits is None or not self.choices:
            return None
        top_k = self.choices[0].top_k
        wanted = self.logits.topk(min(top_k, self.logits.shape[1])).indices.sort(-1).values
        for choice in self.choices:
            if choice.top_k != top_k or not choice.takes_highest or choice.scores.shape != self.logits.shape:
                return None
            if not torch.equal(choice.scores.topk(top_k).indices.sort(-1).values, wanted):
                return None
        return top_k


class BlockLook:
    """How a block chooses, in evaluation and in training.

    Args:
        where: The gate, for error messages.
        block: The module whose forward uses the gate's logits.
        path: Path of the gate's linear map in it.

    Raises:
        UnsupportedModelError: If the block reads the gate's weight itself: the gate, patched, would be gone past.
    """

    def __init__(self, where: str, block: nn.Module, path: str) -> None:
        self.where, self.block = where, block
        linear: Any = linear_of(block, path)
        hidden = normal((1, NUM_TOKENS, full_shape(linear.weight)[1]), torch.Generator().manual_seed(0))
        runs = [_BlockRun(block, path, shaped, training=False) for shaped in (hidden[0], hidden)]
        chosen = [place for place, run in enumerate(runs) if run.choices]
        place = chosen[0] if chosen else 1
        self.evaluation = runs[place]
        self.training = _BlockRun(block, path, (hidden[0], hidden)[place], training=True)
        if self.evaluation.logits is None and (self.evaluation.finished or self.evaluation.choices):
            raise UnsupportedModelError(
                f"{where}: its block {type(block).__name__} does not call it, but reads its weight itself: give "
                "`routers=` a pattern of the block's name instead"
            )

    def top_k(self) -> int:
        """Return how many experts the block chooses, by the highest logits of its gate.

        Raises:
            UnsupportedModelError: If that could not be seen, or it chooses by something else, be it in training only.
        """
        top_k = self.evaluation.top_k()
        if top_k is None and not self.evaluation.choices:
            called = self.evaluation.logits is not None
            problem = "it makes no top-k over the experts" if called else self.evaluation.problem
            raise UnsupportedModelError(
                f"{self.where}: how its block {type(self.block).__name__} chooses experts could not be seen by running "
                f"it on hidden states ({problem}); {HOW}"
            )
        if top_k is None or self.training.top_k() != top_k:
            self._refuse(f"; {HOW}")
        return top_k  # type: ignore[return-value]

    def check_top_k(self, top_k: int) -> None:
        """Refuse a `top_k` setting that differs from the block's own. Noise in training is not checked.

        Raises:
            UnsupportedModelError: If the block chooses otherwise in evaluation.
        """
        if self.evaluation.choices and self.evaluation.top_k() != top_k:
            self._refuse(f", and not {top_k}")

    def _refuse(self, ending: str) -> None:
        raise UnsupportedModelError(
            f"{self.where}: its block {type(self.block).__name__} does not choose by the highest logits of its gate "
            f"(a bias, noise, groups, several steps?){ending}"
        )


def _numbers_but_for_experts(
    block: nn.Module, gate: nn.Module, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Random numbers for the gate and what is beside it; experts, which are large and come after it, have none."""
    number = random_like(generator, torch.float32)
    experts = {
        id(tensor)
        for name, module in block.named_modules()
        if isinstance(module, nn.ModuleList) or name.rpartition(".")[2] == "experts"
        for tensor in (*module.parameters(), *module.buffers())
    } - {id(tensor) for tensor in gate.parameters()}

    def make(tensor: Tensor) -> Tensor:
        if id(tensor) in experts:
            return torch.empty(full_shape(tensor), dtype=torch.float32, device="meta")
        return number(tensor)

    return make
