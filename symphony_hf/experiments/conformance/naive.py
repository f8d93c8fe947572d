"""The choices that reach the experts, and their co-selections: counted without any code of the routing."""

from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.evaluation.routing.hooks import routers_to_watch
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.probe import as_tuple


def watch_choices(model: nn.Module) -> dict[str, list[Tensor]]:
    """Record the choices that each router's experts receive: as indices, as a mask, or as weights that are 0 elsewhere.

    `watching_routers` reports the same by the routers' contracts, which this one tests.
    """
    seen: dict[str, list[Tensor]] = {}
    for name, (router, contract) in routers_to_watch(model).items():
        notes = seen.setdefault(name, [])

        def note_values(values: Any, contract: RouterContract = contract, notes: list[Tensor] = notes) -> None:
            choices = [chosen for value in values if (chosen := _as_choices(value, contract)) is not None]
            notes.extend(choices[:1])

        block = model.get_submodule(name.rpartition(".")[0])
        experts: Any = block._modules.get("experts")
        if experts is not None and not isinstance(experts, nn.ModuleDict):
            hook = lambda module, args, kwargs, note=note_values: note((*args, *kwargs.values()))  # noqa: E731
            experts.register_forward_pre_hook(hook, with_kwargs=True)

        # Experts without arguments of their own are observed by the router's output, without its logits.
        def note_output(module: nn.Module, args: Any, output: Any, note: Any = note_values, c: Any = contract) -> None:
            note(_without_logits(c, output))

        router.register_forward_hook(note_output)
    return seen


def _without_logits(contract: RouterContract, output: Any) -> list[Any]:
    parts = as_tuple(output)
    if contract.choices is not None:  # sorted by expert: only the contract can read it
        return [contract.choices(parts).reshape(-1, contract.top_k)]
    return [part for index, part in enumerate(parts) if index != contract.logits]


def _as_choices(value: Any, contract: RouterContract) -> Tensor | None:
    """Read a tensor as indices of the chosen experts, (tokens, K); None if it is something else."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype == torch.bool:
        return None
    rows = value.reshape(-1, value.shape[-1])
    if rows.shape[1] == contract.top_k and not rows.is_floating_point():
        return rows
    if rows.shape[1] != contract.num_experts:
        return None
    num_chosen = (rows != 0).sum(1)
    if bool((num_chosen == contract.top_k).all()):
        return (rows != 0).long().topk(contract.top_k).indices
    # Experts that receive all logits take the top-k themselves.
    return rows.topk(contract.top_k).indices if bool((num_chosen == rows.shape[1]).all()) else None


def naive_counts(notes: list[Tensor], mask: Tensor, num_experts: int) -> tuple[Tensor, int]:
    """Count one router's co-selections in one forward by loops, from `watch_choices`. `mask` is 0 for padding.

    Returns:
        The count of each pair, shape (E, E), and the number of tokens.
    """
    pairs, num_tokens = torch.zeros(num_experts, num_experts), 0
    for indices in notes[:1]:  # further notes of the same forward repeat the first
        kept = mask.reshape(-1).tolist() if mask.numel() == len(indices) else [1] * len(indices)
        for counts, chosen in zip(kept, indices.tolist(), strict=True):
            if not counts:
                continue
            num_tokens += 1
            for j in chosen:
                for k in chosen:
                    pairs[j, k] += 1
    return pairs, num_tokens
