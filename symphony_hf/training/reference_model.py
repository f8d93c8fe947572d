"""Graphs of a reference model that TRL syncs with the policy."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from symphony_hf.errors import PatchError
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.expert_graph import ExpertGraph, active_graph
from symphony_hf.patching.symphonize import is_symphonized, symphony_routers


def synced_reference(callbacks: Iterable[TrainerCallback], args: TrainingArguments, model: Any) -> Any | None:
    """Return the reference model that TRL mixes the policy into (`sync_ref_model`); None if it does not.

    TRL mixes only parameters, and a graph is a buffer unless it is learned. transformers does not give a callback its
    trainer, so the reference is found through TRL's own callback, among those of the trainer.

    Raises:
        PatchError: If the reference has no graphs, or not those of the policy.
    """
    if not getattr(args, "sync_ref_model", False):
        return None
    reference = next((other.ref_model for other in callbacks if getattr(other, "ref_model", None)), None)
    if reference is None:
        return None
    policy_sizes = [graph.num_experts for graph in graphs_of(model)]
    if not is_symphonized(reference) or [graph.num_experts for graph in graphs_of(reference)] != policy_sizes:
        raise PatchError(
            "SymphonyCallback: sync_ref_model mixes the policy into a reference model without the policy's graphs: "
            "symphonize the reference too, with the same settings, and pass it as `ref_model`"
        )
    return reference


@torch.no_grad()
def mix_graphs(args: Any, state: TrainerState, model: Any, reference: Any) -> None:
    """Mix what training moves beside parameters into the reference's, at TRL's steps and with its weight."""
    if state.global_step % args.ref_model_sync_steps != 0:
        return
    share = args.ref_model_mixup_alpha
    for graph, target in zip(graphs_of(model), graphs_of(reference), strict=True):
        if not isinstance(target.adjacency, nn.Parameter):  # a learned graph, which TRL mixes itself
            target.adjacency.mul_(1.0 - share).add_(graph.symmetrized().to(target.adjacency.device), alpha=share)
        updates = (1.0 - share) * target.updates + share * graph.updates.to(target.updates.device)
        target.updates.copy_(updates.round())
    if tracker_of(model).config.balance == "bias":
        biases = (tracker_of(each).correction_biases() for each in (model, reference))
        for bias, target_bias in zip(*biases, strict=True):
            if not isinstance(target_bias, nn.Parameter):
                target_bias.mul_(1.0 - share).add_(bias.to(target_bias.device), alpha=share)


def graphs_of(model: Any) -> list[ExpertGraph]:
    """Return the graphs that a model routes through, in the order of its routers."""
    return [active_graph(router.symphony) for _, router in symphony_routers(model)]
