"""Checks of the routers: their logits, scores and choices against independent references.

References share no code with the routing: loops in double precision, the base model with other weights, and the inputs
of the experts.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import UnsupportedModelError
from symphony_hf.evaluation.routing.hooks import routers_to_watch, watching_routers
from symphony_hf.patching.attachment import tracker_of, update_graphs
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.families.probe import LinearSpy
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.replay.contexts import record_routing, replay_routing
from symphony_hf.patching.replay.hooks import decoder_routers
from symphony_hf.patching.symphonize import expert_graphs, symphony_routers

from .naive import naive_counts, watch_choices
from .overrides import NO_LOSS
from .specimen import UPSTREAM_ERRORS, Specimen, mix_rows, naive_transition, put_random_graphs, require, require_close


def identity(specimen: Specimen) -> str | None:
    """Check that the logits are bitwise the base's at the start and, with any graph, at strength 0."""
    base, model = specimen.logits(specimen.base), specimen.symphonized()
    require(torch.equal(specimen.logits(model), base), "logits differ at the start")
    with torch.no_grad():
        ours, theirs = (specimen.training_outputs(m).logits for m in (model, specimen.base))
    require(torch.equal(ours, theirs), "logits differ at the start, in training")
    off = put_random_graphs(specimen.symphonized(strength=0.0))
    require(torch.equal(specimen.logits(off), base), "logits differ at strength 0")
    return None


def reference(specimen: Specimen) -> str | None:
    """Check each router's logits against graph-weighted sums, and the model against the base with A W as weights."""
    ours = specimen.logits(specimen.patched)
    require(not torch.equal(ours, specimen.logits(specimen.base)), "a random graph changes nothing")
    require_close(ours, specimen.logits(specimen.reference), "logits against the base with A W, by loops")
    inputs = _router_calls(specimen)
    for name, contract, matrix in specimen.naive_matrices():
        for args, kwargs in inputs[name]:
            raw, smoothed = (
                _linear_output(m.get_submodule(name), contract.linear, args, kwargs) for m in _both(specimen)
            )
            wanted = mix_rows(matrix, raw[:, : contract.num_experts].T).T
            require_close(smoothed[:, : contract.num_experts], wanted, f"{name}: logits")
    return None


def _both(specimen: Specimen) -> tuple[nn.Module, nn.Module]:
    return specimen.base, specimen.patched


def _router_calls(specimen: Specimen) -> dict[str, list[tuple[Any, Any]]]:
    """Return the arguments of each router's calls in a forward of the patched model."""
    calls: dict[str, list[tuple[Any, Any]]] = {}
    with contextlib.ExitStack() as hooks:
        for name, router in symphony_routers(specimen.patched):
            seen = calls[name] = []
            hook = lambda module, args, kwargs, seen=seen: seen.append((_copied(args), kwargs))  # noqa: E731
            hooks.enter_context(router.register_forward_pre_hook(hook, with_kwargs=True))  # type: ignore[attr-defined]
        specimen.logits(specimen.patched)
    return calls


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the tensors: some routers change theirs in place."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in args)


def _linear_output(router: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    rows = linear_of(router, path).weight.shape[0]  # type: ignore[union-attr, index]
    with torch.no_grad(), LinearSpy(rows) as spy:  # type: ignore[arg-type]
        type(router).forward(router, *_copied(args), **kwargs)
    return spy.outputs[-1].reshape(-1, rows)  # type: ignore[call-overload]


def recorded(specimen: Specimen) -> str | None:
    """Check the router logits that transformers records against those of the base with A W as weights."""
    if reason := fails_with_router_logits(specimen):
        return reason
    got, wanted = (_recorded(specimen, model) for model in (specimen.patched, specimen.reference))
    if not wanted:
        return "transformers records no router logits for it"
    require(len(got) == len(wanted), f"{len(got)} tensors are recorded, not {len(wanted)}")
    for index, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        require_close(ours, theirs, f"recorded logits {index}")
    return None


def fails_with_router_logits(specimen: Specimen) -> str | None:
    """Return why the stock model cannot record router logits; None if it can."""
    try:
        _recorded(specimen, specimen.base)
    except UPSTREAM_ERRORS as error:
        return f"the stock model fails when asked for router logits ({type(error).__name__}: {error})"
    return None


def _recorded(specimen: Specimen, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        outputs = model.eval()(**specimen.batch, output_router_logits=True)
    names = ("router_logits", "encoder_router_logits", "decoder_router_logits")
    values = [value for name in names for value in (getattr(outputs, name, None) or ())]
    return [value for value in values if isinstance(value, Tensor)]


def watched(specimen: Specimen) -> str | None:
    """Check that `watching_routers` reports the choices that reach the experts, of a stock and of a patched model."""
    for model in (copy.deepcopy(specimen.base), put_random_graphs(specimen.symphonized())):
        reached = watch_choices(model)
        with watching_routers(model) as records:
            specimen.logits(model)
        require(any(records.values()), "no router was seen to run")
        for name, router in routers_to_watch(model).items():
            require(not records[name] or bool(reached[name]), f"{name}: nothing was seen to reach its experts")
            for routed in records[name][:1]:
                chosen = routed.indices_TK.sort(-1).values
                # Contracts with a `choices` function hand on another form (ZAYA, with an expert that does nothing).
                for seen in reached[name][:1] if router.contract.choices else reached[name]:
                    require(torch.equal(chosen, seen.sort(-1).values), f"{name}: not what reached the experts")
                require(routed.logits_TE.shape == (len(chosen), router.contract.num_experts), f"{name}: not its logits")
    return None


def require_same_routing(specimen: Specimen, patched: nn.Module, folded: nn.Module) -> None:
    """Compare routing before and after folding: the same experts, and float32 logits that differ by rounding alone."""
    routed = []
    for model in (patched, folded):
        with watching_routers(model) as records:
            specimen.logits(model)
        routed.append(records)
    for name, calls in routed[0].items():
        for ours, theirs in zip(calls, routed[1][name], strict=True):
            off = float((ours.logits_TE - theirs.logits_TE).abs().max())
            bound = 1e-5 * max(1.0, float(ours.logits_TE.abs().max()))
            require(off <= bound, f"{name}: folded, its logits are off by {off:.3g}")
            chosen, wanted = (one.indices_TK.sort(-1).values for one in (ours, theirs))
            require(torch.equal(chosen, wanted), f"{name}: folded, it chooses other experts")


def replayed(specimen: Specimen) -> str | None:
    """Check that a forward's own choices, replayed, change no bit, and that other choices reach the experts."""
    other = copy.deepcopy(specimen.base)
    for router in routers_to_watch(other).values():
        linear: Any = linear_of(router.module, router.contract.linear)
        with torch.no_grad():
            linear.weight.copy_(linear.weight.flip(0))
    try:
        with record_routing(other) as given:
            specimen.logits(other)
    except UnsupportedModelError as error:
        return str(error).rpartition(": ")[2]
    for model in (copy.deepcopy(specimen.base), put_random_graphs(specimen.symphonized())):
        with record_routing(model) as own:
            logits = specimen.logits(model)
        require(bool((own.experts != given.experts).any()), "the other choices are the same")
        with replay_routing(model, own):
            require(torch.equal(specimen.logits(model), logits), "replaying its own choices changes the logits")
        with replay_routing(model, given), record_routing(model) as again:
            require(bool(torch.isfinite(specimen.logits(model)).all()), "logits are not finite with other choices")
        require(torch.equal(again.experts, given.experts), "the choices are not those given")
        reached, routers = watch_choices(model), decoder_routers(model)
        with replay_routing(model, given):
            specimen.logits(model)
        wanted = {routers[index].name: experts for index, experts in zip(given.routers, given.experts, strict=True)}
        for found in routers:
            # The router's own output comes first, and what its experts get last. ZAYA's has another form.
            seen = reached[found.name][0 if found.contract.choices else -1].sort(-1).values
            chosen = wanted[found.name].flatten(0, 1).long().sort(-1).values
            require(torch.equal(chosen, seen), f"{found.name}: not what reached the experts")
    return None


def counts(specimen: Specimen) -> str | None:
    """Check that a training step moves the graph by the choices that reach the experts, without padding."""
    model, batch = specimen.symphonized(decay=0.5), dict(specimen.batch)
    if not model.config.is_encoder_decoder:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, :3] = 0
    seen = watch_choices(model)
    with running_routers(model) as run:
        outputs = specimen.training_outputs(model, batch)
    backward(specimen, model, outputs)
    require(update_graphs(model), "nothing was counted")
    graphs = expert_graphs(model)
    for name, router in symphony_routers(model):
        require(name not in run or bool(seen[name]), f"{name}: no choice could be seen")
        start = torch.eye(router.contract.num_experts) * router.contract.top_k / router.contract.num_experts
        pairs, num_tokens = naive_counts(seen[name], batch["attention_mask"], router.contract.num_experts)
        wanted = 0.5 * start + 0.5 * pairs / num_tokens if num_tokens else start
        # Two roundings of numbers below 1.
        require(torch.allclose(graphs[name], wanted, rtol=0, atol=1e-6), f"{name}: the graph is not the naive count")
    return None


@contextlib.contextmanager
def running_routers(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the routers that run; one for images does not in a batch of text."""
    run: set[str] = set()
    with contextlib.ExitStack() as hooks:
        for name, router in symphony_routers(model):
            module: Any = router
            hooks.enter_context(module.register_forward_pre_hook(lambda module, args, name=name: run.add(name)))
        yield run
    require(bool(run), "no router was seen to run")


def backward(specimen: Specimen, model: nn.Module, outputs: Any) -> None:
    """Run the backward pass of a training forward."""
    if specimen.family in NO_LOSS:
        tracker_of(model).record_loss(outputs.logits.float().square().mean()).backward()
    else:
        outputs.loss.backward()


def scores(specimen: Specimen) -> str | None:
    """Check that smoothing scores starts as the base, and mixes each router's scores by the graph."""
    reasons = {
        r.contract.no_scoring_func for _, r in symphony_routers(specimen.patched) if r.contract.scoring_func is None
    }
    if reasons:
        return ", ".join(sorted(reasons))
    model = specimen.symphonized(smoothing="scores")
    require(torch.equal(specimen.logits(model), specimen.logits(specimen.base)), "logits differ at the start")
    put_random_graphs(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, router in symphony_routers(model):
        graph: Any = router.symphony
        graph.register_forward_hook(lambda m, args, output, name=name: seen.update({name: (args[0], output)}))
    with running_routers(model) as run:
        require(bool(torch.isfinite(specimen.logits(model)).all()), "logits are not finite with a graph")
    require(run == seen.keys(), f"these routers ran without their graphs: {', '.join(sorted(run - seen.keys()))}")
    for name, router in symphony_routers(model):
        if name in seen:
            _check_scores(name, router, *seen[name])
    return None


def _check_scores(name: str, router: Any, before: Tensor, after: Tensor) -> None:
    graph: ExpertGraph = router.symphony
    matrix = naive_transition(graph.adjacency.tolist())
    if router.contract.scoring_func == "softmax":
        transposed = [list(column) for column in zip(*matrix, strict=True)]
        wanted, got = mix_rows(transposed, before.softmax(-1).T).T, after.softmax(-1)
    else:
        wanted, got = mix_rows(matrix, before.sigmoid().T).T, after.sigmoid()
    require_close(got, wanted, f"{name}: scores")
