"""The check of `router_gradient="dense"`: the forward without it, and the dense mixture's gradient in every router.

The reference runs every expert on every token and differentiates the mixture's formula in double precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.symphonize import symphony_routers

from .specimen import Specimen, put_random_graphs, require, require_close

_QUIET = {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}


@dataclass
class _Call:
    """One run of a block's experts in a training forward.

    Attributes:
        name: The router's name.
        contract: Its contract.
        experts: The experts.
        inputs: Hidden states, chosen experts, and their weights.
        logits: The router's logits.
        output: The experts' output.
    """

    name: str
    contract: RouterContract
    experts: nn.Module
    inputs: tuple[Tensor, Tensor, Tensor]
    logits: Tensor
    output: Tensor


def router_gradient(specimen: Specimen) -> str | None:
    """Check the gradient of every router's logits, and that the forward is the same as without it."""
    reasons = {r.contract.no_weighting for _, r in symphony_routers(specimen.patched) if r.contract.weighting is None}
    if reasons:
        return ", ".join(sorted(reasons))
    stock, model = (
        put_random_graphs(specimen.symphonized(router_gradient=value, **_QUIET)) for value in ("chosen", "dense")
    )
    calls = _watch_experts(model)
    logits = specimen.training_outputs(model).logits
    with torch.no_grad():
        require(torch.equal(logits, specimen.training_outputs(stock).logits), "the logits of a forward differ")
    torch.manual_seed(1)
    tensors = [tensor for call in calls for tensor in (call.output, call.logits)]
    gradients = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), tensors, allow_unused=True)
    checked = 0
    for call, of_output, of_logits in zip(calls, gradients[::2], gradients[1::2], strict=True):
        if of_output is not None:  # a last layer's tokens may not all reach the logits
            expected = _expected(call, of_output)
            size = expected.abs().max()
            require_close(of_logits / size, expected / size, f"{call.name}: gradient of its logits")
            checked += 1
    require(checked > 0, "no gradient reached an expert that was seen to run")
    return None


def _watch_experts(model: nn.Module) -> list[_Call]:
    """Return a list to which every run of the experts adds itself."""
    calls: list[_Call] = []
    for name, router in symphony_routers(model):
        _watch(name, router, model.get_submodule(name.rpartition(".")[0]).experts, calls)  # type: ignore[arg-type]
    return calls


def _watch(name: str, router: Any, experts: nn.Module, calls: list[_Call]) -> None:
    contract, seen = router.contract, []
    router.register_forward_hook(lambda module, args, outputs: seen.append(outputs[contract.logits]))
    experts.register_forward_hook(
        lambda module, args, output: (
            calls.append(_Call(name, contract, experts, args, seen.pop(), output)) if output.requires_grad else None
        )
    )


def _expected(call: _Call, gradient_TD: Tensor) -> Tensor:
    """Return the gradient of the dense mixture, whose weights have the chosen experts' sum where these are."""
    hidden_TD, chosen_TK, weights_TK = call.inputs
    products = []
    for expert in range(call.contract.num_experts):
        index_T1 = torch.full_like(chosen_TK[:, :1], expert)
        with torch.no_grad():
            output_TD = call.experts(hidden_TD, index_T1, torch.ones_like(weights_TK[:, :1]))
        products.append((output_TD.double() * gradient_TD.double()).sum(-1))
    weighting: Any = call.contract.weighting
    logits_TE = call.logits.detach().double().reshape(len(chosen_TK), -1).requires_grad_()
    scores_TE = logits_TE.sigmoid() if weighting.scoring_func == "sigmoid" else logits_TE.softmax(-1)
    if weighting.renormalized:
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    scale_T1 = weights_TK.sum(-1, keepdim=True) / scores_TE.gather(1, chosen_TK.long()).sum(-1, keepdim=True)
    (expected,) = torch.autograd.grad((scale_T1.detach() * scores_TE * torch.stack(products, dim=1)).sum(), logits_TE)
    return expected.view_as(call.logits)
