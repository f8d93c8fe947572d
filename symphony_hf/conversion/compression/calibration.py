"""Statistics of experts on calibration text: co-selections, mean outputs and gated output norms."""

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
    """Sums over the tokens that one layer's experts have seen.

    Args:
        layer: Observed layer.
        outputs: Whether to run every expert on every token, for `mean_outputs`.
        norms: Whether to run every expert on the tokens that selected it, for `reap`.

    Attributes:
        counts: Number of co-selections of each pair of experts, with each expert's load on the diagonal. Shape:
            (num_experts, num_experts), float64, on the CPU.
        num_tokens: Number of tokens.
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
        """Number of tokens that selected each expert. Shape: (num_experts,), float64."""
        return self.counts.diagonal()

    @property
    def adjacency(self) -> Tensor:
        """Co-selection graph of these tokens: co-selections per token. Shape: (E, E), float32."""
        return (self.counts / self.num_tokens).float()

    @property
    def mean_outputs(self) -> Tensor:
        """Mean output of each expert over all tokens, selected or not. Shape: (num_experts, hidden size), float64.

        Source: HC-SMoE (arXiv 2410.08589), which measures the similarity of experts by their mean outputs.
        """
        assert self._output_sums is not None
        return self._output_sums / self.num_tokens

    @property
    def reap(self) -> Tensor:
        """Gate weight times output norm, averaged over the tokens that selected each expert; 0 if there are none.

        Shape: (num_experts,), float64.

        Source: REAP (arXiv 2510.13999). Deviation: none known; the weight is the one passed to the experts, after the
        family's normalization and scaling.
        """
        return torch.where(self.load > 0, self._gated_norms / self.load, 0.0)

    def see(self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record hidden states, selected experts and weights, as a forward pre-hook of the experts."""
        hidden, indices, weights = (*args, *kwargs.values())
        hidden_TD, indices_TK, weights_TK = (value.reshape(-1, value.shape[-1]) for value in (hidden, indices, weights))
        if indices_TK.shape != weights_TK.shape:
            raise UnsupportedModelError(
                f"`{self.layer.router.name}`: its experts get weights of shape {tuple(weights_TK.shape)} for indices "
                f"of shape {tuple(indices_TK.shape)}: not one for each"
            )
        self.counts += count_coselections(indices_TK, self.layer.num_experts).double().cpu()
        self.num_tokens += len(hidden_TD)
        for expert in range(self.layer.num_experts):
            if self._outputs:
                self._add_output(expert, _run_expert(experts, expert, hidden_TD, weights_TK.dtype))
            if self._norms:
                tokens, ranks = (indices_TK == expert).nonzero(as_tuple=True)
                if len(tokens):
                    output_TD = _run_expert(experts, expert, hidden_TD[tokens], weights_TK.dtype)
                    gated_T = weights_TK[tokens, ranks].double() * output_TD.double().norm(dim=-1)
                    self._gated_norms[expert] += gated_T.sum().cpu()

    def _add_output(self, expert: int, output_TD: Tensor) -> None:
        if self._output_sums is None:
            self._output_sums = torch.zeros(self.layer.num_experts, output_TD.shape[-1], dtype=torch.float64)
        self._output_sums[expert] += output_TD.double().sum(0).cpu()


def _run_expert(experts: nn.Module, expert: int, hidden_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """Run one expert on all tokens through the family's own forward: each token selects it alone, with weight 1."""
    chosen_T1 = torch.full((len(hidden_TD), 1), expert, device=hidden_TD.device)
    ones_T1 = torch.ones(len(hidden_TD), 1, device=hidden_TD.device, dtype=dtype)
    # Calling the module would run the hook that this is called from.
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
    """Run a plain model on blocks of tokens without padding, and collect statistics of its experts by layer.

    `outputs` and `norms` are those of `ExpertStatistics`.

    Raises:
        EvaluationError: If no token reaches a layer, or an output is not finite.
        UnsupportedModelError: If the experts do not get a weight for each selection.
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
