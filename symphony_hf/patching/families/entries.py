"""Facts that inspection cannot find, one entry by name for each router class that needs one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """Facts about a router class.

    Attributes:
        top_k: Experts chosen per token, where neither the router nor its block says.
        choices: Reads the chosen experts from the router's output, where they are not one tensor of it.
        image_tokens: By the name of the router's block: whether it gets the tokens of images alone, or all others.
        no_weighting: Reason why experts that a token did not choose cannot take part in the router's gradient.
        refusal: Says of a router of the class why it cannot be patched; None where it can.
    """

    top_k: int | None = None
    choices: Callable[[tuple[Any, ...]], Tensor] | None = None
    image_tokens: Mapping[str, bool] = field(default_factory=dict)
    no_weighting: str = ""
    refusal: Callable[[nn.Module], str | None] = lambda router: None


def _choices_with_skip_expert(outputs: tuple[Any, ...]) -> Tensor:
    """ZAYA masks its last expert, which skips the layer, to weight 0 and number 0."""
    logits, weights, indices, _ = outputs
    return indices.masked_fill(weights == 0, logits.shape[-1] - 1)


def _choices_sorted_by_expert(outputs: tuple[Any, ...]) -> Tensor:
    """JetMoE returns the order that sorts its choices by expert, and how many each expert has."""
    order, _, _, num_by_expert, logits = outputs
    experts = torch.arange(logits.shape[-1], device=order.device)
    sorted_choices = experts.repeat_interleave(torch.tensor(num_by_expert, device=order.device))
    return torch.empty_like(order).index_copy(0, order, sorted_choices)


def _choices_above_the_cut(outputs: tuple[Any, ...]) -> Tensor:
    """Our SmoothRouter returns the K highest experts, then one that it adds."""
    _, _, indices = outputs
    return indices[:, :-1]


def _refuse_drawn_choices(router: Any) -> str | None:
    if router.second_expert_policy == "all":
        return None
    return (
        f"second_expert_policy is {router.second_expert_policy!r}, by which it draws its second expert and does not "
        "say which: set it to 'all'"
    )


def _refuse_product_keys(router: nn.Module) -> str:
    return (
        "it chooses by product keys: its router scores halves of keys, not experts, so there is no graph of experts to "
        "smooth over"
    )


VISUAL = ("multi_modal_projector", "vision_tower", "vision_model", "visual", "connector")
"""Modules that get the tokens of images alone, by what families call them."""

ENTRIES = {
    "SwitchTransformersTop1Router": Entry(top_k=1),  # the choice is a one-hot mask, less what is over capacity
    "NllbMoeTop2Router": Entry(top_k=2, refusal=_refuse_drawn_choices),  # likewise
    "LongcatFlashTopkRouter": Entry(no_weighting="its experts do not run with one expert for each token"),
    "ZayaRouter": Entry(choices=_choices_with_skip_expert),
    "Ernie4_5_VLMoeMoeTopKRouter": Entry(image_tokens={"text_moe": False, "vision_moe": True}),
    # Ours, in the place of an MLP of a vision tower or of a projector, where there is no padding.
    "TopKRouter": Entry(image_tokens=dict.fromkeys(VISUAL, True)),
    "SmoothRouter": Entry(choices=_choices_above_the_cut),
    "JetMoeTopKGating": Entry(choices=_choices_sorted_by_expert),
    "DogeCDMoE": Entry(refusal=_refuse_product_keys),
}
NO_ENTRY = Entry()


def entry_of(router_class: type) -> Entry:
    """Return the entry of a router class, or of its base class."""
    return next((ENTRIES[base.__name__] for base in router_class.__mro__ if base.__name__ in ENTRIES), NO_ENTRY)
