"""Checks of balancing over an optimizer step: the load that its loss uses, and the bias that moves by it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import ConfigError
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.symphonize import symphony_routers

from .naive import naive_counts, watch_choices
from .routing_checks import backward
from .specimen import Specimen, require

_RATE = 0.125
"""Step of the bias: a power of two, so that sums of it are exact."""


def step_balance(specimen: Specimen) -> str | None:
    """Check that each of two micro-batches is balanced by the naive load of the micro-batches so far."""
    try:
        model = specimen.symphonized(balance_scope="step", balance_loss_weight=1.0)
    except ConfigError:
        return "a router is in a part that a batch may leave out"
    for loads in _train(specimen, model):
        for name, router in symphony_routers(model):
            load_E, num_tokens = loads[name]
            used_E = router.stack.record.loads_LE[router.layer_index]  # type: ignore[union-attr, index]
            # Two roundings of numbers below 1.
            close = torch.allclose(used_E, load_E / max(num_tokens, 1), rtol=0, atol=1e-6)
            require(close, f"{name}: the load is not the naive one of the step")
    return None


def bias(specimen: Specimen) -> str | None:
    """Check that a graph update moves the correction bias by the sign of each expert's missing load."""
    try:
        model = specimen.symphonized(balance="bias", bias_rate=_RATE)
    except ConfigError:
        return "no bias to choose by"
    before = _biases(model)
    *_, loads = _train(specimen, model)
    require(update_graphs(model), "nothing was counted")
    for name, bias_E in _biases(model).items():
        load_E, _ = loads[name]
        wanted_E = before[name] + _RATE * torch.sign(load_E.mean() - load_E)
        # One rounding of a number of about 1.
        require(torch.allclose(bias_E, wanted_E, rtol=0, atol=1e-6), f"{name}: its bias is not moved by the naive load")
    return None


def _biases(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    counters = {id(router.stack): router.stack for _, router in symphony_routers(model)}
    names = {id(router): name for name, router in symphony_routers(model)}
    for counter in counters.values():
        stack: Any = counter
        for router, tensor in zip(stack.routers, stack.placed.correction_biases(), strict=True):
            found[names[id(router)]] = tensor.detach().flatten().clone()
    return found


def _train(specimen: Specimen, model: Any) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Run two micro-batches, the first with padding. Yields each router's naive load and tokens so far, by name."""
    seen, totals = watch_choices(model), dict[str, tuple[Tensor, int]]()
    for padding in (3, 0):
        batch = dict(specimen.batch)
        if padding and not model.config.is_encoder_decoder:
            batch["attention_mask"] = batch["attention_mask"].clone()
            batch["attention_mask"][0, :padding] = 0
        outputs = specimen.training_outputs(model, batch)
        for name, router in symphony_routers(model):
            pairs, num_tokens = naive_counts(seen[name], batch["attention_mask"], router.contract.num_experts)  # type: ignore[union-attr]
            load_E, before = totals.get(name, (torch.zeros(len(pairs)), 0))
            totals[name] = load_E + pairs.diagonal(), before + num_tokens
            seen[name].clear()
        yield totals
        backward(specimen, model, outputs)
