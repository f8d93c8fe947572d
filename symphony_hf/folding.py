"""fold: the graphs into the routers' own weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import FoldError
from .families import linear_of
from .graph import active_graph, is_adapted
from .patching import check_whole, symphony_routers, unsymphonize


def folded_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The router weights (and biases) that hold the graph in themselves, by parameter name.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly.
    """
    if is_adapted(model):
        raise FoldError("fold: the model has PEFT's adapters in it: `merge_and_unload()` first")
    routers = list(symphony_routers(model))
    check_whole(model, "fold")
    folded: dict[str, Tensor] = {}
    for name, router in routers:
        contract = router.contract
        linear: Any = linear_of(router, contract.linear)  # type: ignore[arg-type]
        graph = active_graph(router.symphony)
        if graph.config.smoothing != "logits":
            raise FoldError(
                f"fold: `{name}` smooths scores, after softmax, which no plain router computes: only smoothing="
                "`logits` folds"
            )
        weight: Tensor = linear.weight
        sharded = hasattr(weight, "full_tensor")  # FSDP2's, between forwards
        if not weight.is_floating_point() or weight.is_meta or weight.numel() == 0 or sharded:
            raise FoldError(f"fold: the weight of `{name}` is quantized, offloaded or partitioned: load it whole first")
        path = f"{name}.{contract.linear}" if contract.linear else name
        for parameter_name in ("weight", "bias"):
            parameter = getattr(linear, parameter_name, None)
            if isinstance(parameter, Tensor):
                with torch.no_grad():
                    folded[f"{path}.{parameter_name}"] = router.apply_graph(parameter)
    return folded


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Fold each graph into its router's weight, in place: a plain model, with the same logits to the bit.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly; the model is left as it was.
    """
    parameters = folded_parameters(model)
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)
    return unsymphonize(model)
