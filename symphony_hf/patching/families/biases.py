"""A router's biases: the one by which it chooses experts and does not weigh them, and one outside its linear map."""

import torch
from torch import Tensor, nn

from symphony_hf.errors import UnsupportedModelError

from .probe import NUM_TOKENS, Probe, uniform
from .substitution import linear_of

_STEP = 1e-4
"""Largest change of a bias that is to leave most choices as they are, where scores and biases are about 1."""


def correction_bias(
    probe: Probe, indices: int | None, carrier: int, num_experts: int, block: nn.Module | None
) -> tuple[str | None, bool]:
    """Return the path of the bias that chooses experts and does not weigh them, and whether the block holds it.

    Args:
        probe: The router's probe.
        indices: Place of the chosen experts in the output.
        carrier: Place of their weights.
        num_experts: Number of experts.
        block: The module that calls the router.
    """
    if indices is None:
        return None, False
    in_block = {name: value for name, value in probe.arguments.items() if hasattr(block, name)}
    in_router = dict((*probe.router.named_parameters(), *probe.router.named_buffers()))
    for is_in_block, tensors in ((True, in_block), (False, in_router)):
        for path, tensor in tensors.items():
            is_by_expert = tensor.numel() == num_experts and tensor.is_floating_point()
            if is_by_expert and _chooses(probe, tensor, indices, carrier):
                return path, is_in_block
    return None, False


def _chooses(probe: Probe, bias: Tensor, indices: int, carrier: int) -> bool:
    """Whether every token chooses an expert whose entry is raised, by the same product and with the same weights."""
    raised = bias.clone()
    raised.view(-1)[0] += 1e3
    outputs, product = probe.run_with(bias, raised)
    chosen_TK = outputs[indices].reshape(NUM_TOKENS, -1)
    if not torch.equal(product, probe.raw) or not (chosen_TK == 0).any(1).all():
        return False
    # A constant would not do for all entries: a softmax over the chosen scores takes it away again.
    moved = bias + _STEP * uniform(tuple(bias.shape), torch.Generator().manual_seed(0))
    outputs, _ = probe.run_with(bias, moved)
    stays_T = (outputs[indices] == probe.outputs[indices]).reshape(NUM_TOKENS, -1).all(1)
    now, before = (parts[carrier].reshape(NUM_TOKENS, -1)[stays_T] for parts in (outputs, probe.outputs))
    return bool(stays_T.any()) and torch.equal(now, before)


def check_outside_bias(probe: Probe, is_returned: bool, correction_bias: str | None) -> None:
    """Refuse a `bias` beside the linear map's product that may be a part of the logits.

    Args:
        probe: The router's probe.
        is_returned: Whether the router returns its logits, which are the product then.
        correction_bias: Path of the bias in the router that chooses and does not weigh.

    Raises:
        UnsupportedModelError: If it is not known what the bias is for.
    """
    path = f"{probe.linear}.bias".strip(".")
    has_bias = isinstance(getattr(linear_of(probe.router, probe.linear), "bias", None), Tensor)
    if has_bias and "bias" not in probe.parameters and not is_returned and correction_bias != path:
        raise UnsupportedModelError(
            f"{probe.where}: its `{path}` is not in the product with its weight, and its output does not show whether "
            "it is a part of the logits: return the logits, or add it in `torch.nn.functional.linear`"
        )
