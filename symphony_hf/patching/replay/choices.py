"""RoutingChoices: the experts that each token of some sequences chose, in every layer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from symphony_hf.errors import DataError
from symphony_hf.files import replacing
from symphony_hf.patching.families.discovery import FoundRouter

_FORMAT = "symphony_hf routing choices 1"


class RoutingChoices:
    """Experts chosen by each token.

    A sequence's tokens are counted from its first one, without padding, so choices can be replayed with padding on
    either side, or with several sequences packed into a row. The arguments are kept as attributes.

    Args:
        experts: Chosen experts, in each router's own order; -1 after a sequence's last token. Shape: (layers,
            sequences, positions, top_k), int16.
        routers: For each layer, the index of its router among the model's. A router that runs twice has two layers.
        num_experts: Number of experts of each layer.
        tokens: Token ids of the sequences, -1 after the last; None where they are unknown. Shape: (sequences,
            positions), int32.

    Raises:
        DataError: If `experts` has another number of dimensions.
    """

    def __init__(
        self,
        experts: Tensor | None = None,
        routers: Sequence[int] = (),
        num_experts: Sequence[int] = (),
        tokens: Tensor | None = None,
    ) -> None:
        self.experts = torch.empty(0, 0, 0, 0, dtype=torch.int16) if experts is None else experts.to(torch.int16)
        if self.experts.dim() != 4:
            raise DataError(
                "RoutingChoices: expected `experts` of shape (layers, sequences, positions, top_k), got "
                f"{tuple(self.experts.shape)}"
            )
        self.routers = list(routers)
        self.num_experts = list(num_experts)
        self.tokens = tokens

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.experts.shape[1]

    def __getitem__(self, sequences: Any) -> "RoutingChoices":
        """Return the choices of some sequences, in the order given: a slice, indices, or the index of one."""
        if isinstance(sequences, int):
            sequences = [range(len(self))[sequences]]  # raises IndexError after the last, which ends an iteration
        tokens = None if self.tokens is None else self.tokens[sequences]
        return RoutingChoices(self.experts[:, sequences], self.routers, self.num_experts, tokens)

    def lengths(self) -> Tensor:
        """Return the number of tokens of each sequence whose choices are known. Shape: (sequences,)."""
        return (self.experts[0, :, :, 0] >= 0).sum(-1) if len(self.experts) else self.experts.new_zeros(len(self))

    def save(self, path: str | Path) -> None:
        """Write the choices to a safetensors file, atomically."""
        tensors = {"experts": self.experts.cpu().contiguous()}
        if self.tokens is not None:
            tensors["tokens"] = self.tokens.cpu().contiguous()
        notes = {"routers": json.dumps(self.routers), "num_experts": json.dumps(self.num_experts)}
        with replacing(Path(path)) as written:
            written.write_bytes(save(tensors, {"format": _FORMAT, **notes}))

    @classmethod
    def load(cls, path: str | Path) -> "RoutingChoices":
        """Read the choices that `save` has written.

        Raises:
            DataError: If the file is missing, or is not one of `save`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            if notes.get("format") != _FORMAT:
                raise DataError(f"`{path}` holds no routing choices: write them with `choices.save(path)`")
            routers, num_experts = (json.loads(notes[name]) for name in ("routers", "num_experts"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"`{path}` cannot be read as routing choices ({error}): is it truncated?") from error
        return cls(tensors["experts"], routers, num_experts, tensors.get("tokens"))


def choices_for(given: Any, routers: list[FoundRouter]) -> RoutingChoices:
    """Return choices in the form that a model replays, checked against its routers.

    Args:
        given: RoutingChoices; a tensor of shape (layers, sequences, positions, top_k); or one array of shape
            (positions, layers, top_k) for each sequence, as vLLM returns them for `return_routed_experts`. Their layers
            are those with a router, or all layers of the model.
        routers: The model's routers, in the order in which they run.

    Raises:
        DataError: If they are of other layers, experts or numbers of experts than the model's, or were not captured.
    """
    if not isinstance(given, RoutingChoices):
        experts_LSPK = _stacked(given)
        if len(experts_LSPK) != len(routers):
            experts_LSPK = _layers_with_a_router(experts_LSPK, routers)
        experts = [router.contract.num_experts for router in routers]
        given = RoutingChoices(experts_LSPK, range(len(routers)), experts)
    if not len(given) or not given.experts.numel():
        raise DataError("replay_routing: there are no choices: was a forward of the model recorded?")
    _check_layers(given, routers)
    _check_experts(given)
    return given


def _stacked(given: Any) -> Tensor:
    """Return a tensor of shape (layers, sequences, positions, top_k), also of one array for each sequence."""
    if isinstance(given, Tensor) and given.dim() == 4:
        return given
    try:
        arrays = [torch.as_tensor(array) for array in ([given] if getattr(given, "ndim", 0) == 3 else given)]
    except (TypeError, ValueError) as error:
        raise DataError(f"replay_routing: {type(given).__name__} is no choices of experts ({error})") from error
    shapes = [tuple(array.shape) for array in arrays]
    if not arrays or any(len(shape) != 3 or shape[1:] != shapes[0][1:] for shape in shapes):
        raise DataError(
            "replay_routing: expected choices of shape (layers, sequences, positions, top_k), or an array of shape "
            f"(positions, layers, top_k) for each sequence, got {shapes}"
        )
    padded = torch.nn.utils.rnn.pad_sequence([array.long() for array in arrays], batch_first=True, padding_value=-1)
    return padded.permute(2, 0, 1, 3)


def _layers_with_a_router(experts_LSPK: Tensor, routers: list[FoundRouter]) -> Tensor:
    """Take the layers that have a router from choices of all layers: dense ones have zeros there."""
    layers = [router.layer for router in routers]
    num_layers = len(experts_LSPK)
    others = sorted(set(range(num_layers)) - set(layers))
    if len(set(layers)) < len(layers) or max(layers) >= num_layers or bool((experts_LSPK[others] > 0).any()):
        raise DataError(
            f"replay_routing: the choices are of {num_layers} layers, and the model has {len(routers)} routers (in "
            f"layers {layers}): they are another model's"
        )
    return experts_LSPK[layers]


def _check_layers(choices: RoutingChoices, routers: list[FoundRouter]) -> None:
    num_layers, top_k = len(choices.experts), choices.experts.shape[-1]
    if len(choices.routers) != num_layers or {*choices.routers} != {*range(len(routers))}:
        raise DataError(
            f"replay_routing: the choices are of {len({*choices.routers})} routers, and the model has {len(routers)}: "
            "they are another model's"
        )
    for index, num_experts in zip(choices.routers, choices.num_experts, strict=True):
        router = routers[index]
        if (num_experts, top_k) != (router.contract.num_experts, router.contract.top_k):
            raise DataError(
                f"replay_routing: the choices are {top_k} of {num_experts} experts, and `{router.name}` chooses "
                f"{router.contract.top_k} of {router.contract.num_experts}: they are another model's"
            )


def _check_experts(choices: RoutingChoices) -> None:
    experts = choices.experts
    if choices.experts.shape[-1] > 1 or len(experts) > 1 or experts.shape[2] > 1:
        per_sequence = experts.transpose(0, 1).flatten(1)
        unset = (per_sequence.amax(1) == 0).nonzero().flatten().tolist()
        if unset:
            raise DataError(
                f"replay_routing: every choice of sequence {unset[0]} is expert 0: it was not captured (vLLM needs "
                "`enable_return_routed_experts`, and leaves zeros for what a cache of prefixes has served)"
            )
    limits = torch.tensor(choices.num_experts, device=experts.device).view(-1, 1, 1, 1)
    if bool((experts >= limits).any()) or bool((experts < -1).any()):
        raise DataError(
            f"replay_routing: a choice is outside of the {max(choices.num_experts)} experts: {int(experts.min())} to "
            f"{int(experts.max())}"
        )
    repeated = (experts.sort(-1).values.diff(dim=-1) == 0).any(-1) & (experts >= 0).all(-1)
    if bool(repeated.any()):
        layer, sequence, position = repeated.nonzero()[0].tolist()
        raise DataError(
            f"replay_routing: token {position} of sequence {sequence} chose an expert twice in layer {layer} "
            f"({experts[layer, sequence, position].tolist()}): its choices were not captured"
        )
    known_LSP = (experts >= 0).all(-1)
    if bool((known_LSP != known_LSP[:1]).any()) or bool((known_LSP[0].long().diff(dim=-1) > 0).any()):
        raise DataError("replay_routing: the choices of a sequence have gaps: all layers need those of the same tokens")
