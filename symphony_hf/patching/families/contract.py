"""A router's contract: where its linear map is, and where the logits, the weights and the choices are in its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from symphony_hf.routing.gradient import ScoringFunc, Weighting

EXPERTS = "experts"
"""Name of the module beside a router that runs the chosen experts, in every family of transformers that has one."""


@dataclass(frozen=True)
class RouterContract:
    """How to run a router and to read what its forward returns.

    Attributes:
        num_experts: E, the experts that are chosen from.
        top_k: Experts chosen per token, K.
        linear: Path of the linear map inside the router; empty where the router holds the weight itself.
        calls_linear: Whether the forward calls an inner linear map; otherwise it reads its weight.
        parameters: Names of the map's parameters that are in its product, which the graph changes: `bias` is not one of
            them where the router adds it elsewhere, such as to its scores to choose.
        logits: Place of the raw logits, (tokens, E), in the output; None: they are not in it, and are what the inner
            linear map returned, or, where its weight is read, the input times that.
        carrier: Place of a float tensor that the experts use, to which a loss can be attached.
        indices: Place of the chosen experts, (tokens, K), in the output; None: the K highest logits are chosen.
        choices: Reads the chosen experts from the output instead, where that takes more.
        image_tokens: True where the router gets the tokens of images alone, False where it gets all others; None: all.
        correction_bias: Path of the bias that is added to scores to choose experts and not to weigh them; None without.
        bias_in_block: Whether the router's block holds that bias and passes it; otherwise the router does.
        scoring_func: Function that turns logits into weights, needed for smoothing `scores`; None if it is unknown.
        no_scoring_func: Reason why `scoring_func` is None.
        weighting: How the weights in the output are made from its logits, needed for a `router_gradient` of experts
            that were not chosen; None if that is not known.
        no_weighting: Reason why `weighting` is None.
    """

    num_experts: int
    top_k: int
    linear: str = ""
    calls_linear: bool = False
    parameters: tuple[str, ...] = ("weight",)
    logits: int | None = 0
    carrier: int = 0
    indices: int | None = None
    choices: Callable[[tuple[Any, ...]], Tensor] | None = None
    image_tokens: bool | None = None
    correction_bias: str | None = None
    bias_in_block: bool = False
    scoring_func: ScoringFunc | None = None
    no_scoring_func: str = ""
    weighting: Weighting | None = None
    no_weighting: str = ""

    @property
    def block_chooses(self) -> bool:
        """Whether the router returns its logits alone, by which its block chooses."""
        return self.carrier == self.logits

    def chosen_experts(self, outputs: tuple[Any, ...], logits_TE: Tensor) -> Tensor:
        """Return the experts that each token chose. Shape: (tokens, top_k), integer.

        Args:
            outputs: What the router returned.
            logits_TE: The logits that chose. Shape: (tokens, num_experts).
        """
        if self.choices is not None:
            chosen = self.choices(outputs)
        elif self.indices is not None:
            chosen = outputs[self.indices]
        else:
            chosen = logits_TE.topk(self.top_k, dim=-1).indices
        # As many as were chosen: a user may have changed the number since the contract was read.
        return chosen.reshape(len(logits_TE), -1)
