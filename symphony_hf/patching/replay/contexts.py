"""record_routing and replay_routing: contexts that note the experts a model chooses, or choose them again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.errors import DataError, PatchError

from .choices import RoutingChoices, choices_for
from .hooks import RoutedForward, RoutingHooks
from .layout import TokenLayout


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingChoices]:
    """Record the experts that each token chooses in every forward within this context.

        with symphony_hf.record_routing(model) as choices:
            model.generate(**inputs)
        choices.save("choices.safetensors")

    A forward that continues a cache, as `generate` runs for each new token, adds positions to the sequences of the one
    before. Any other forward adds sequences: its rows, or what `position_ids` says is packed into them. Routers of
    image encoders are left out. The last token of a generation runs through no forward, so it has no choices.

    Args:
        model: Any MoE model that `symphonize` supports, with graphs or without, also wrapped. It is not changed.

    Yields:
        The choices, which are complete when the context ends.

    Raises:
        UnsupportedModelError: If a router does not choose its experts by a top-k.
        PatchError: If the model is compiled, a part of it is called by itself, a mask with four dimensions hides
            padding, or the rows of the cache change between two forwards, as in beam search.
    """
    recorder, choices = _Recorder(), RoutingChoices()
    hooks = RoutingHooks(model, "record_routing", recorder.open, recorder.close)
    try:
        yield choices
        vars(choices).update(vars(recorder.gather([router.contract.num_experts for router in hooks.routers])))
    finally:
        recorder.forwards.clear()
        hooks.close()


class _Recorder:
    """The forwards of a context, and their sequences."""

    def __init__(self) -> None:
        self.forwards: list[RoutedForward] = []
        self._num_sequences = 0

    def open(self, layout: TokenLayout) -> RoutedForward:
        if not layout.continues:
            return RoutedForward(layout, self._num_sequences)
        if not self.forwards or self.forwards[-1].layout.num_sequences != layout.num_sequences:
            raise PatchError(
                f"record_routing: a forward of {layout.num_sequences} rows continues a cache that no forward with as "
                "many rows has filled in this context: record the prompt, too"
            )
        return RoutedForward(layout, self.forwards[-1].first)

    def close(self, forward: RoutedForward) -> None:
        self.forwards.append(forward)
        self._num_sequences = forward.first + forward.layout.num_sequences

    def gather(self, num_experts: list[int]) -> RoutingChoices:
        """Put together what the forwards have recorded.

        Args:
            num_experts: The number of experts of each router.
        """
        if not self.forwards:
            return RoutingChoices()
        routers = self.forwards[0].routers
        if any(forward.routers != routers for forward in self.forwards):
            raise PatchError("record_routing: the forwards ran different layers: are layers dropped?")
        length = 1 + max(int(forward.layout.index_T.max()) for forward in self.forwards)
        chosen_LTK = torch.stack([call.cpu() for call in self.forwards[0].chosen])
        experts = chosen_LTK.new_full((len(chosen_LTK), self._num_sequences, length, chosen_LTK.shape[-1]), -1)
        has_ids = all(forward.layout.ids_T is not None for forward in self.forwards)
        tokens = torch.full((self._num_sequences, length), -1, dtype=torch.int32) if has_ids else None
        for forward in self.forwards:
            kept_T = (forward.layout.index_T >= 0).cpu()
            sequence_T = forward.first + forward.layout.sequence_T.cpu()[kept_T]
            index_T = forward.layout.index_T.cpu()[kept_T]
            experts[:, sequence_T, index_T] = torch.stack([call.cpu() for call in forward.chosen])[:, kept_T]
            if tokens is not None and forward.layout.ids_T is not None:
                tokens[sequence_T, index_T] = forward.layout.ids_T.cpu()[kept_T].int()
        return RoutingChoices(experts, routers, [num_experts[router] for router in routers], tokens)


@contextmanager
def replay_routing(model: nn.Module, choices: Any) -> Iterator[None]:
    """Choose recorded experts again in every forward within this context.

        with symphony_hf.replay_routing(model, choices):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()

    The gate weights are computed from the current logits, with gradient, by the model's own scoring, normalization and
    scaling. Expert graphs count the replayed choices. Each forward takes the choices of as many sequences as it has,
    in their order; after the last, the first come again. A forward that fails takes none. Padding, and the token after
    the last that is known, are routed as usual. A sequence may be cut at its end. Layers that checkpointing runs again
    in backward replay, too, after this context as well.

    Args:
        model: Any MoE model that `symphonize` supports, with graphs or without, also wrapped. It is not changed.
        choices: What `record_routing` or `RoutingChoices.load` gave; a tensor of shape (layers, sequences, positions,
            top_k), -1 after the end of a sequence; or one array of shape (positions, layers, top_k) for each sequence,
            as vLLM returns them for `return_routed_experts`.

    Raises:
        DataError: If the choices are of another model, are not captured, or do not fit a forward's sequences.
        UnsupportedModelError: If a router does not choose its experts by a top-k.
        PatchError: If the model is compiled, no forward ran, a part of the model is called by itself, or the rows of
            the cache change between two forwards, as in beam search.
    """
    replay = _Replay()
    hooks = RoutingHooks(model, "replay_routing", replay.open, replay.close)
    try:
        replay.choices = choices_for(choices, hooks.routers)
        yield
        if not replay.num_forwards:
            raise PatchError(
                f"replay_routing: no forward of {type(hooks.model).__name__} ran in the context: nothing was replayed"
            )
    finally:
        hooks.close()


class _Replay:
    """Takes the choices of each forward from those of all sequences."""

    def __init__(self) -> None:
        self.choices = RoutingChoices()
        self.num_forwards = 0
        self._first = self._next = 0

    def open(self, layout: TokenLayout) -> RoutedForward:
        num_known, first = len(self.choices), self._first
        if not layout.continues:
            first = self._next if self._next < num_known else 0
        if first + layout.num_sequences > num_known:
            raise DataError(
                f"replay_routing: a forward of {layout.num_sequences} sequences, and choices of "
                f"{num_known - first} more (of {num_known}): give the choices of its own sequences, "
                "`choices[indices]`"
            )
        sequence_T, index_T = first + layout.sequence_T.cpu(), layout.index_T.cpu()
        self._check_positions(sequence_T, index_T, layout)
        experts = self.choices.experts
        inside_T = ((index_T >= 0) & (index_T < experts.shape[2])).to(experts.device)
        sequence_T, index_T = sequence_T.to(experts.device), index_T.to(experts.device)
        given_LTK = experts[:, sequence_T, index_T.clamp(0, experts.shape[2] - 1)]
        given_LTK = given_LTK.masked_fill(~inside_T.view(1, -1, 1), -1)
        return RoutedForward(layout, first, given_LTK.to(layout.index_T.device))

    def close(self, forward: RoutedForward) -> None:
        self.num_forwards += 1
        self._first, self._next = forward.first, forward.first + forward.layout.num_sequences

    def _check_positions(self, sequence_T: Tensor, index_T: Tensor, layout: TokenLayout) -> None:
        known_T = self.choices.lengths().cpu()[sequence_T]
        beyond = (index_T > known_T).nonzero().flatten()
        if len(beyond):
            token = int(beyond[0])
            raise DataError(
                f"replay_routing: sequence {int(sequence_T[token])} has more than {int(index_T[token])} tokens, and "
                f"choices of {int(known_T[token])}: positions do not fit"
            )
        if self.choices.tokens is None or layout.ids_T is None:
            return
        is_known_T = (index_T >= 0) & (index_T < known_T)
        recorded = self.choices.tokens[sequence_T[is_known_T], index_T[is_known_T]].cpu()
        differing = (recorded != layout.ids_T.cpu()[is_known_T]).nonzero().flatten()
        if len(differing):
            sequence = int(sequence_T[is_known_T][differing[0]])
            raise DataError(
                f"replay_routing: sequence {sequence} has other tokens than those whose choices were recorded: give "
                "the choices in the order of its rows, `choices[indices]`"
            )
