"""How many parameters each part of a model has, and how many of them one token uses."""

from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from .parts import Anatomy, Part
from .tensors import HeldTensor, held_tensors


@dataclass(frozen=True)
class PartCount:
    """One part's parameters.

    Attributes:
        part: Which.
        total: All of them.
        active: Those that one token uses: all but of the experts, where it is top-k of each; None where no router is
            known, and so no top-k.
        trainable: Those that require a gradient.
    """

    part: Part
    total: int
    active: int | None
    trainable: int


def count_parts(model: nn.Module, anatomy: Anatomy | None = None) -> list[PartCount]:
    """Count a model's parameters by part, in the order of `Part`, without the parts that it does not have.

    Tied weights count once. A quantized weight counts as what it stands for. A graph's adjacency counts under
    `Part.GRAPHS`, also where it is a buffer.

    Args:
        model: Any model of transformers; also on the meta device, adapted by PEFT, or quantized.
        anatomy: Of the model, where it is known.
    """
    anatomy = anatomy or Anatomy(model)
    held_by_part: dict[Part, list[HeldTensor]] = {}
    for held in held_tensors(model):
        held_by_part.setdefault(anatomy.part_of(held), []).append(held)
    return [_count(part, held_by_part[part], anatomy) for part in Part if part in held_by_part]


def _count(part: Part, held: list[HeldTensor], anatomy: Anatomy) -> PartCount:
    total = sum(tensor.numel for tensor in held)
    trainable = sum(tensor.numel for tensor in held if tensor.tensor.requires_grad)
    if part is not Part.EXPERTS:
        return PartCount(part, total, total, trainable)
    shares = [_chosen_share(tensor, anatomy) for tensor in held]
    if None in shares:
        return PartCount(part, total, None, trainable)
    active = sum((share * tensor.numel for share, tensor in zip(shares, held, strict=True) if share), Fraction(0))
    return PartCount(part, total, round(active), trainable)


def _chosen_share(held: HeldTensor, anatomy: Anatomy) -> Fraction | None:
    """The share of experts that a token chooses. A router may choose from more than have weights: some do nothing."""
    routing = anatomy.routing_of(held.name)
    if routing is None:
        return None
    stacked = held.shape[0] if len(held.shape) == 3 else routing.num_experts
    return Fraction(min(routing.top_k, stacked), stacked)
