"""Identification of the linear layers of a dense MLP, from its children and by running it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symphony_hf.errors import UpcycleError

_GATE, _UP, _DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


@dataclass(frozen=True)
class MlpParts:
    """Parts of a dense MLP.

    Attributes:
        kind: `plain`: down(act(up(x))). `gated`: down(act(gate(x)) * up(x)).
        up: First linear layer, or the gate and the up-projection.
        down: Last linear layer.
        act: Activation.
    """

    kind: Literal["plain", "gated"]
    up: tuple[nn.Linear, ...]
    down: nn.Linear
    act: Any

    @property
    def has_bias(self) -> bool:
        return self.down.bias is not None

    def compute(self, x: Tensor) -> Tensor:
        """Compute the MLP's output from its parts."""
        first, *second = (linear(x) for linear in self.up)
        inner = self.act(first)
        return self.down(inner * second[0] if second else inner)


def read_mlp(name: str, module: nn.Module) -> MlpParts:
    """Return the parts of an MLP: two linear layers and an activation between them, or three with a gate.

    Raises UpcycleError if it has another form, or does not compute what its parts do. `name` is for the message.
    """
    linears = {child_name: child for child_name, child in module.named_children() if isinstance(child, nn.Linear)}
    acts = [child for child in module.children() if not isinstance(child, nn.Linear | nn.Dropout | nn.Identity)]
    where = f"`{name}` ({type(module).__name__})"
    wrong_type = [n for n, linear in linears.items() if type(linear) is not nn.Linear]
    if wrong_type:
        raise UpcycleError(
            f"upcycle_modules: {where}: `{wrong_type[0]}` is a {type(linears[wrong_type[0]]).__name__}: quantized and "
            "adapted weights cannot be copied; load the plain model"
        )
    if len(acts) != 1 or list(acts[0].parameters()):
        raise UpcycleError(f"upcycle_modules: {where} is not an MLP: expected one activation, found {len(acts)}")
    parts = _parts(linears, acts[0])
    if parts is None:
        raise UpcycleError(
            f"upcycle_modules: {where} is not a known MLP: expected two linear layers, or a gate, an up- and a "
            f"down-projection, found {', '.join(linears) or 'none'}. Name the MLP itself"
        )
    if len({linear.bias is None for linear in (*parts.up, parts.down)}) > 1:
        raise UpcycleError(f"upcycle_modules: {where}: some of its linear layers have a bias, and some do not")
    _check_computes(where, module, parts)
    return parts


def _parts(linears: dict[str, nn.Linear], act: nn.Module) -> MlpParts | None:
    if len(linears) == 2:
        up, down = linears.values()
        return MlpParts("plain", (up,), down, act) if down.in_features == up.out_features else None
    by_role = [next((linears[n] for n in names if n in linears), None) for names in (_GATE, _UP, _DOWN)]
    if len(linears) != 3 or any(linear is None for linear in by_role):
        return None
    return MlpParts("gated", (by_role[0], by_role[1]), by_role[2], act)  # type: ignore[arg-type]


def _check_computes(where: str, module: nn.Module, parts: MlpParts) -> None:
    """Run the MLP on random inputs; on the meta device only the shape is compared."""
    weight = parts.down.weight
    x = torch.randn(4, parts.up[0].in_features, generator=torch.Generator().manual_seed(0)).to(weight)
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            wanted, got = module(x), parts.compute(x)
    except (RuntimeError, TypeError) as error:
        raise UpcycleError(f"upcycle_modules: {where} does not take hidden states alone ({error})") from error
    finally:
        for child, training in modes.items():
            child.training = training
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape or not _are_close(got, wanted):
        raise UpcycleError(f"upcycle_modules: {where} computes something else than its linear layers and activation")


def _are_close(got: Tensor, wanted: Tensor) -> bool:
    if wanted.is_meta:
        return True
    return bool(F.l1_loss(got.float(), wanted.float()) <= 1e-4 * wanted.float().abs().mean())
