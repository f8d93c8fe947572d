"""What is seen to arrive at the experts: a count of choices that shares nothing with the routing's own."""

from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.evaluation.routing.hooks import routers_to_watch
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.probe import as_tuple


def watch_choices(model: nn.Module) -> dict[str, list[Tensor]]:
    """Note what each router's experts are told to do: by indices, or by a mask or weights that are 0 for the others.

    `watching.watching_routers` says the same by the routers' contracts, which are what is put to the test here.
    """
    seen: dict[str, list[Tensor]] = {}
    for name, (router, contract) in routers_to_watch(model).items():
        notes = seen.setdefault(name, [])

        def note_values(values: Any, contract: RouterContract = contract, notes: list[Tensor] = notes) -> None:
            told = [chosen for value in values if (chosen := _as_choices(value, contract)) is not None]
            notes.extend(told[:1])

        block = model.get_submodule(name.rpartition(".")[0])
        experts: Any = block._modules.get("experts")
        if experts is not None and not isinstance(experts, nn.ModuleDict):
            hook = lambda module, args, kwargs, note=note_values: note((*args, *kwargs.values()))  # noqa: E731
            experts.register_forward_pre_hook(hook, with_kwargs=True)

        # Where experts are told otherwise, by what the router says, less its logits.
        def note_output(module: nn.Module, args: Any, output: Any, note: Any = note_values, c: Any = contract) -> None:
            note(_told(c, output))

        router.register_forward_hook(note_output)
    return seen


def _told(contract: RouterContract, output: Any) -> list[Any]:
    parts = as_tuple(output)
    if contract.choices is not None:  # sorted by expert: nothing else to read it by
        return [contract.choices(parts).reshape(-1, contract.top_k)]
    return [part for place, part in enumerate(parts) if place != contract.logits]


def _as_choices(value: Any, contract: RouterContract) -> Tensor | None:
    """A tensor as indices of the chosen experts, (tokens, K), if it can be read so."""
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
    # Experts that are given all logits take the highest themselves.
    return rows.topk(contract.top_k).indices if bool((num_chosen == rows.shape[1]).all()) else None


def naive_counts(notes: list[Tensor], mask: Tensor, num_experts: int) -> tuple[Tensor, int]:
    """Count by loops which experts were chosen together.

    Args:
        notes: What `watch_choices` noted of one router, in one forward. Shape of each: (tokens, K).
        mask: 0 for padding. Shape: (rows, length).
        num_experts: E.

    Returns:
        How often each pair was chosen, shape (E, E), and by how many tokens.
    """
    pairs, num_tokens = torch.zeros(num_experts, num_experts), 0
    for indices in notes[:1]:  # what the router said, or the experts were told after it, is the same
        kept = mask.reshape(-1).tolist() if mask.numel() == len(indices) else [1] * len(indices)
        for counts, chosen in zip(kept, indices.tolist(), strict=True):
            if not counts:
                continue
            num_tokens += 1
            for j in chosen:
                for k in chosen:
                    pairs[j, k] += 1
    return pairs, num_tokens
