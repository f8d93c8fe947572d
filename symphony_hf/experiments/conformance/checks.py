"""The checks of a family, one function each: those of the whole model here, those of its routers in `routing_checks`.

A check returns None if it holds, a reason if it does not apply to the family, and raises ConformanceError if it fails.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.folding import export_folded, fold
from symphony_hf.patching.symphonize import expert_graphs, symphony_routers, unsymphonize

from .balance_checks import bias, step_balance
from .gradient_check import router_gradient
from .overrides import NO_LOSS
from .routing_checks import (
    backward,
    counts,
    fails_with_router_logits,
    identity,
    recorded,
    reference,
    replayed,
    require_same_routing,
    scores,
    watched,
)
from .specimen import UPSTREAM_ERRORS, Specimen, put_random_graphs, require, require_close
from .tiny import auto_class_of

Check = Callable[[Specimen], str | None]

NO_AUX_TERM = "its loss has no aux term"
"""Reason of half of the families, which their table does not repeat."""


def gradients(specimen: Specimen) -> str | None:
    """Check that the gradients of the loss, the balance loss and the z-loss reach every router that saw a token."""
    plain, ours = (specimen.symphonized(balance_loss_weight=w, z_loss_weight=w) for w in (0.0, 0.1))
    for model in (plain, ours):
        backward(specimen, model, specimen.training_outputs(model))
    reached = 0
    for (name, without), (_, router) in zip(symphony_routers(plain), symphony_routers(ours), strict=True):
        before, after = (_weight_of(r).grad for r in (without, router))
        if before is None or after is None:
            require(before is after and _saw_nothing(router), f"{name}: no gradient")
            continue
        reached += 1
        require(bool(torch.isfinite(after).all()), f"{name}: its gradient is not finite")
        require(bool(after.abs().sum() > 0), f"{name}: its gradient is 0")
        require(not torch.equal(before, after), f"{name}: the router losses have no gradient there")
    require(reached > 0, "no router was reached")
    return None


def _weight_of(router: Any) -> Any:
    return linear_of(router, router.contract.linear).weight


def _saw_nothing(router: Any) -> bool:
    """Return whether a router counted no token, as a router for images does in a batch without them."""
    pending = router.stack.state.pending.get(router.stack.key)
    return pending is None or bool(pending.tokens_L[router.layer_index] == 0)


def own_loss(specimen: Specimen) -> str | None:
    """Check that the model's own aux loss is off while ours is on, and is restored afterwards."""
    if specimen.family in NO_LOSS:
        return "its forward computes no loss"
    if reason := fails_with_router_logits(specimen):
        return reason
    alone, base = (_loss(specimen, specimen.base, output_router_logits=asked) for asked in (False, True))
    if torch.equal(alone, base):
        return NO_AUX_TERM
    model = specimen.symphonized()
    plain, asked = (_loss(specimen, model, output_router_logits=asked) for asked in (False, True))
    require(torch.equal(plain, asked), f"asked for router logits, its loss is {asked:.4g} instead of {plain:.4g}")
    unsymphonize(model)
    again = _loss(specimen, model, output_router_logits=True)
    require(torch.equal(again, base), "its own loss does not come back")
    return None


def _loss(specimen: Specimen, model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**specimen.batch, **kwargs).loss


def bfloat16(specimen: Specimen) -> str | None:
    """Check bfloat16: bitwise the base at the start and folded, float32 graphs, finite logits with a random graph."""
    half = Specimen(specimen.family, torch.bfloat16)
    try:
        half.logits(half.base)
    except UPSTREAM_ERRORS as error:
        return f"the stock model fails in bfloat16 ({type(error).__name__}: {error})"
    model = half.symphonized()
    require(torch.equal(half.logits(model), half.logits(half.base)), "logits differ at the start")
    put_random_graphs(model)
    require(bool(torch.isfinite(half.logits(model)).all()), "logits are not finite with a graph")
    require({graph.dtype for graph in expert_graphs(model).values()} == {torch.float32}, "a graph is not float32")
    ours = half.logits(model)
    require(torch.equal(half.logits(fold(model)), ours), "folded, logits differ")
    return None


def save_load(specimen: Specimen) -> str | None:
    """Check saving and loading by the Auto class: no missing or unexpected keys, bitwise equal graphs and logits."""
    with tempfile.TemporaryDirectory() as folder:
        specimen.patched.save_pretrained(folder)
        loaded, info = auto_class_of(specimen.family).from_pretrained(folder, output_loading_info=True)
    problems = {kind: keys for kind, keys in info.items() if keys}
    require(not problems, f"loading found {problems}")
    graphs, wanted = expert_graphs(loaded), expert_graphs(specimen.patched)
    require(graphs.keys() == wanted.keys(), "other routers are symphonized after loading")
    require(all(torch.equal(graphs[name], wanted[name]) for name in wanted), "a graph changed")
    _align(loaded)
    require(torch.equal(specimen.logits(loaded), specimen.logits(specimen.patched)), "logits differ after loading")
    return None


def _align(model: nn.Module) -> None:
    """Copy weights out of the mapped file: the order of sums depends on the alignment of memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def folded(specimen: Specimen) -> str | None:
    """Check that the folded export is a stock checkpoint with the base's names, and routes as the model does."""
    ours = specimen.logits(specimen.patched)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        specimen.base.save_pretrained(first)
        export_folded(specimen.patched, second)
        require(_tensor_names(first) == _tensor_names(second), "its names are not the base's")
        loaded, info = auto_class_of(specimen.family).from_pretrained(second, output_loading_info=True)
    require(not any(info.values()), f"loading found {info}")
    require(type(loaded) is type(specimen.base), f"it loads as {type(loaded).__name__}")
    require(not hasattr(loaded.config, "symphony"), "its config still has our settings")
    _align(loaded)
    plain = specimen.logits(loaded)
    require_close(plain, ours, "logits, folded")
    require_same_routing(specimen, specimen.patched, loaded)
    in_place = fold(put_random_graphs(specimen.symphonized()))
    require(torch.equal(specimen.logits(in_place), plain), "logits differ, folded in place")
    return None


def _tensor_names(folder: str) -> dict[str, list[int]]:
    names = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
    return names


def unsymphonized(specimen: Specimen) -> str | None:
    """Check that `unsymphonize` restores classes, names, config and logits."""
    model = put_random_graphs(specimen.symphonized())
    unsymphonize(model)
    base = specimen.base
    require([type(m) for m in model.modules()] == [type(m) for m in base.modules()], "a class differs")
    require(list(model.state_dict()) == list(base.state_dict()), "a name differs")
    require(model.config.to_dict() == base.config.to_dict(), "the config differs")
    require(torch.equal(specimen.logits(model), specimen.logits(base)), "logits differ")
    return None


def generate(specimen: Specimen) -> str | None:
    """Check greedy generation, with the family's own cache, against the base with A W as router weights."""
    if not specimen.base.can_generate():
        return "its class does not generate"
    ours, wanted = (_generated(specimen, model) for model in (specimen.patched, specimen.reference))
    require(torch.equal(ours, wanted), "the generated tokens differ")
    return None


def _generated(specimen: Specimen, model: Any) -> Tensor:
    inputs = {name: specimen.batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    generated = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    return getattr(generated, "sequences", generated)


def images(specimen: Specimen) -> str | None:
    """Check batches with images: bitwise the base at the start, and the base with A W with a random graph."""
    if specimen.images is None:
        return "text alone"
    batch = specimen.images
    base = specimen.logits(specimen.base, batch)
    require(torch.equal(specimen.logits(specimen.symphonized(), batch), base), "logits differ at the start")
    ours = specimen.logits(specimen.patched, batch)
    require(not torch.equal(ours, base), "a random graph changes nothing")
    require_close(ours, specimen.logits(specimen.reference, batch), "logits against the base with A W, by loops")
    return None


CHECKS: dict[str, Check] = {
    "identity": identity,
    "reference": reference,
    "recorded": recorded,
    "watched": watched,
    "replay": replayed,
    "counts": counts,
    "gradients": gradients,
    "router gradient": router_gradient,
    "bias": bias,
    "step balance": step_balance,
    "own loss": own_loss,
    "bfloat16": bfloat16,
    "save, load": save_load,
    "fold": folded,
    "unsymphonize": unsymphonized,
    "generate": generate,
    "scores": scores,
    "images": images,
}
