"""What experts do on text: who is chosen together, what each one's output is, and how much of it arrives."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import EvaluationError, UnsupportedModelError
from symphony_hf.evaluation.batching import evaluating
from symphony_hf.routing.graph import count_coselections

from .layers import ExpertLayer


class ExpertStatistics:
    """Sums over the tokens that came by one layer's experts.

    Args:
        layer: Whose.
        outputs: Whether every expert is run on every token, for `mean_outputs`.
        norms: Whether every expert is run on the tokens that chose it, for `reap`.

    Attributes:
        counts: How often each pair of experts was chosen together, each expert's load on the diagonal. Shape:
            (num_experts, num_experts), float64, on the CPU.
        num_tokens: Seen.
    """

    def __init__(self, layer: ExpertLayer, *, outputs: bool = False, norms: bool = False) -> None:
        self.layer = layer
        self.counts = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
        self.num_tokens = 0
        self._output_sums: Tensor | None = None
        self._gated_norms = torch.zeros(layer.num_experts, dtype=torch.float64)
        self._outputs, self._norms = outputs, norms

    @property
    def load(self) -> Tensor:
        """Tokens that chose each expert. Shape: (num_experts,), float64."""
        return self.counts.diagonal()

    @property
    def adjacency(self) -> Tensor:
        """The graph that these tokens alone would make: co-selections a token. Shape: (E, E), float32."""
        return (self.counts / self.num_tokens).float()

    @property
    def mean_outputs(self) -> Tensor:
        """Each expert's output, averaged over all tokens, chosen or not. Shape: (num_experts, hidden size), float64.

        Source: HC-SMoE (arXiv 2410.08589), by which experts are alike whose mean outputs are near.
        """
        assert self._output_sums is not None
        return self._output_sums / self.num_tokens

    @property
    def reap(self) -> Tensor:
        """Gate weight times norm of the output, averaged over the tokens that chose an expert; 0 where none did.

        Shape: (num_experts,), float64.

        Source: REAP (arXiv 2510.13999). Deviation: none known; the weight is the one that the experts are given, after
        whatever the family's router does to it (normalized over the chosen ones, scaled).
        """
        return torch.where(self.load > 0, self._gated_norms / self.load, 0.0)

    def see(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the experts: hidden states, chosen experts and weights, before they are run."""
        hidden, indices, weights = (*args, *kwargs.values())
        hidden_TD, indices_TK, weights_TK = (value.reshape(-1, value.shape[-1]) for value in (hidden, indices, weights))
        if indices_TK.shape != weights_TK.shape:
            raise UnsupportedModelError(
                f"`{self.layer.router.name}`: its experts get weights of shape {tuple(weights_TK.shape)} for choices "
                f"of shape {tuple(indices_TK.shape)}: not one for each"
            )
        self.counts += count_coselections(indices_TK, self.layer.num_experts).double().cpu()
        self.num_tokens += len(hidden_TD)
        for expert in range(self.layer.num_experts):
            if self._outputs:
                self._add_output(expert, _run_expert(experts, expert, hidden_TD, weights_TK.dtype))
            if self._norms:
                tokens, places = (indices_TK == expert).nonzero(as_tuple=True)
                if len(tokens):
                    output_TD = _run_expert(experts, expert, hidden_TD[tokens], weights_TK.dtype)
                    gated_T = weights_TK[tokens, places].double() * output_TD.double().norm(dim=-1)
                    self._gated_norms[expert] += gated_T.sum().cpu()

    def _add_output(self, expert: int, output_TD: Tensor) -> None:
        if self._output_sums is None:
            self._output_sums = torch.zeros(self.layer.num_experts, output_TD.shape[-1], dtype=torch.float64)
        self._output_sums[expert] += output_TD.double().sum(0).cpu()


def _run_expert(experts: nn.Module, expert: int, hidden_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert on all tokens, by the family's own forward: each token chooses it alone, with weight 1."""
    chosen_T1 = torch.full((len(hidden_TD), 1), expert, device=hidden_TD.device)
    ones_T1 = torch.ones(len(hidden_TD), 1, device=hidden_TD.device, dtype=dtype)
    # Not by calling the module, whose hook this runs in.
    output: Tensor = type(experts).forward(experts, hidden_TD, chosen_T1, ones_T1)
    return output


def calibrate(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    blocks_NT: Tensor,
    *,
    batch_size: int = 8,
    outputs: bool = False,
    norms: bool = False,
) -> list[ExpertStatistics]:
    """Run a model on text, and see what its experts do.

    Args:
        model: Plain.
        layers: Its own.
        blocks_NT: Token ids, without padding. Shape: (blocks, block size).
        batch_size: Blocks a forward.
        outputs: Whether `mean_outputs` is wanted: every expert is then run on every token.
        norms: Whether `reap` is.

    Returns:
        One a layer.

    Raises:
        EvaluationError: If no token reached a layer, or an output is not finite.
        UnsupportedModelError: If the experts are not given a weight for each choice.
    """
    seen = [ExpertStatistics(layer, outputs=outputs, norms=norms) for layer in layers]
    hooks = [
        layer.experts.register_forward_pre_hook(statistics.see, with_kwargs=True)  # type: ignore[arg-type]
        for layer, statistics in zip(layers, seen, strict=True)
    ]
    try:
        with evaluating(model) as device:
            for ids in tqdm(blocks_NT.split(batch_size), desc="Calibrating", unit=" batches", delay=2, disable=None):
                model(input_ids=ids.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, statistics in zip(layers, seen, strict=True):
        if statistics.num_tokens == 0:
            raise EvaluationError(f"`{layer.router.name}`: no token of the calibration text reached its experts")
        values = [statistics.reap, *([statistics.mean_outputs] if outputs else [])]
        if not all(value.isfinite().all() for value in values):
            raise EvaluationError(f"`{layer.router.name}`: an expert's output is not finite: load it in float32")
    return seen
