"""How much of a model's routing survives an attack on its input."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from .alignment import aligned_positions
from .batching import Windows, evaluating, flatten, padded_batches


@dataclass(frozen=True, eq=False)
class RoutingKept:
    """The share of routing choices that an attack left as they were, on the tokens that it left alone."""

    share: float
    """Mean over layers, in [0, 1]. Choosing at random would keep K / E."""
    per_layer: np.ndarray
    """The same of each MoE layer. Shape: (layers,)."""
    num_tokens: int
    """Untouched tokens that were compared."""


def _router_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, top_k: int) -> tuple[Tensor, ...]:
    output = model(input_ids=input_ids, attention_mask=attention_mask, output_router_logits=True)
    logits = getattr(output, "router_logits", None)
    if not logits:
        raise EvaluationError(
            f"{type(model).__name__}: its output has no `router_logits`. Pass the part of the model that has the "
            "routers and takes token ids, such as `model.language_model` of a vision-language model"
        )
    for number, logits_TE in enumerate(logits):
        num_rows, num_experts = logits_TE.numel() // logits_TE.shape[-1], logits_TE.shape[-1]
        if num_rows != input_ids.numel():
            raise EvaluationError(
                f"MoE layer {number}: router logits for {num_rows} tokens, the batch has {input_ids.numel()}: only "
                "models whose routers see every token can be compared token by token"
            )
        if not 1 <= top_k <= num_experts:
            raise EvaluationError(f"`top_k` is {top_k}; MoE layer {number} has {num_experts} experts to choose from")
    return logits


def record_routing(
    model: nn.Module, windows: Windows, top_k: int, batch_size: int = 16, *, progress: str | None = None
) -> Tensor:
    """The experts that every token chose, in every MoE layer.

    The choice is read off as the top k of the recorded router logits: that of routers which take the top k of
    their logits or of a softmax of them. Routers with a selection bias or with groups of experts choose otherwise.

    Args:
        model: A model that takes `input_ids`, `attention_mask` and `output_router_logits=True`, and whose output
            has `.router_logits`: for each MoE layer one tensor of shape (windows * length, num_experts).
        windows: Token ids by document name, in windows without overlap. Shape of each: (2 to block_size,), int64.
        top_k: Experts chosen per token, K.
        batch_size: Windows a forward.
        progress: What the progress bar says; no bar when None.

    Returns:
        Expert numbers, sorted within a token, of all tokens of all documents in order. int64, on the CPU: 8 * K
        bytes a token and layer. Shape: (layers, tokens, top_k).

    Raises:
        EvaluationError: If the output has no router logits, or not one row for each token.
    """
    flat, _ = flatten(windows)
    chosen_by_window: dict[int, Tensor] = {}
    with evaluating(model) as device:
        for indices, input_ids, attention_mask in padded_batches(flat, batch_size, device, progress):
            logits = _router_logits(model, input_ids, attention_mask, top_k)
            chosen = torch.stack([layer.topk(top_k).indices.view(*input_ids.shape, top_k) for layer in logits])
            chosen = chosen.sort(-1).values.cpu()
            for row, index in enumerate(indices):
                chosen_by_window[index] = chosen[:, row, : len(flat[index])]
    return torch.cat([chosen_by_window[index] for index in range(len(flat))], dim=1)


def choices_kept(clean_TK: Tensor, attacked_TK: Tensor) -> float:
    """The share of a token's K experts that it still chooses, |clean & attacked| / K, averaged over tokens.

    Args:
        clean_TK: Experts chosen, distinct within a token. Shape: (..., tokens, top_k), integer.
        attacked_TK: Experts that the same tokens chose in the attacked text. Same shape.

    Returns:
        A share in [0, 1]: exactly 1 if every token kept all its experts, in whatever order.
    """
    kept = (clean_TK.unsqueeze(-1) == attacked_TK.unsqueeze(-2)).any(-1)
    return int(kept.sum()) / kept.numel()


def _untouched_tokens(clean: Windows, attacked: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the untouched tokens among all tokens of the clean and of the attacked documents."""
    positions: list[tuple[np.ndarray, np.ndarray]] = []
    clean_start, attacked_start = 0, 0
    for name in clean:
        clean_ids = torch.cat(list(clean[name])).tolist()
        attacked_ids = torch.cat(list(attacked[name])).tolist()
        clean_T, attacked_T = aligned_positions(clean_ids, attacked_ids)
        positions.append((clean_start + clean_T, attacked_start + attacked_T))
        clean_start += len(clean_ids)
        attacked_start += len(attacked_ids)
    clean_parts, attacked_parts = zip(*positions, strict=True)
    return np.concatenate(clean_parts), np.concatenate(attacked_parts)


def routing_kept(
    model: nn.Module,
    clean_windows: Windows,
    attacked_windows: Windows,
    *,
    top_k: int,
    batch_size: int = 16,
    progress: str | None = None,
) -> RoutingKept:
    """Compare the experts that untouched tokens choose in clean documents and in their attacked versions.

    The documents are aligned as wholes, so their windows may be cut at different words. A token near a cut then
    has another context in both texts, for every model alike: compare models on the same windows.

    Args:
        model: As in `record_routing`.
        clean_windows: Token ids by document name, in windows without overlap.
        attacked_windows: The same of the attacked texts: the same names, the same tokenizer.
        top_k: Experts chosen per token, K.
        batch_size: Windows a forward.
        progress: What the progress bars say, before "clean" and "attacked"; no bars when None.

    Returns:
        The share of choices kept. Exactly 1 where the documents are identical.

    Raises:
        EvaluationError: If the documents differ by name or have no token in common, or the model records no
            router logits.
    """
    if clean_windows.keys() != attacked_windows.keys():
        differing = sorted(clean_windows.keys() ^ attacked_windows.keys())
        raise EvaluationError(f"documents that are only clean or only attacked: {differing[:3]}; each needs both")
    attacked_windows = {name: attacked_windows[name] for name in clean_windows}
    for windows in (clean_windows, attacked_windows):
        flatten(windows)  # refuses unusable ones, before any work
    clean_T, attacked_T = _untouched_tokens(clean_windows, attacked_windows)
    if not len(clean_T):
        raise EvaluationError("no token is the same in clean and attacked documents: were they tokenized alike?")
    bars = [None if progress is None else f"{progress}, {text}" for text in ("clean", "attacked")]
    clean = record_routing(model, clean_windows, top_k, batch_size, progress=bars[0])
    attacked = record_routing(model, attacked_windows, top_k, batch_size, progress=bars[1])
    layers = zip(clean[:, clean_T], attacked[:, attacked_T], strict=True)
    per_layer = np.array([choices_kept(clean_TK, attacked_TK) for clean_TK, attacked_TK in layers])
    return RoutingKept(float(per_layer.mean()), per_layer, len(clean_T))
