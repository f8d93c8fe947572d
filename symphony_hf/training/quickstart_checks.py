"""Comparison of the quickstart's saved checkpoints, whole and folded, with the model that was trained."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from symphony_hf.errors import EvaluationError
from symphony_hf.patching.folding import export_folded, folded_parameters


@torch.inference_mode()
def compare_saved_forms(
    model: PreTrainedModel, windows: dict[str, list[torch.Tensor]], output: Path, top_k: int
) -> dict[str, float | bool]:
    """Compare the logits of the reloaded and of the folded checkpoint with the model's.

    Those of the folded one are compared at the tokens before the first in their window with another choice of experts,
    which rounding may change at a near tie, and which changes all logits after it.
    """
    model.eval().cpu()  # where the checkpoints are loaded
    export_folded(model, output / "folded")
    starts = [texts[0] for texts in windows.values()][:16]
    ids = torch.stack([start[: min(map(len, starts))] for start in starts])
    expected = model(ids, output_router_logits=True)
    reloaded = AutoModelForCausalLM.from_pretrained(output / "symphony")(ids)
    folded = AutoModelForCausalLM.from_pretrained(output / "folded")(ids, output_router_logits=True)
    same_LBT = torch.stack(
        [
            (_chosen(a, top_k) == _chosen(b, top_k)).all(-1).view(ids.shape)
            for a, b in zip(expected.router_logits, folded.router_logits, strict=True)
        ]
    )
    is_compared_BT = same_LBT.all(0).int().cumprod(-1).bool()
    difference_BT = (folded.logits - expected.logits).abs().amax(-1)
    return {
        "reload_max_difference": float((reloaded.logits - expected.logits).abs().max()),
        "folded_max_difference": float(difference_BT.where(is_compared_BT, 0.0).max()),
        "max_logit": float(expected.logits.abs().max()),
        "folded_same_choices": float(same_LBT.float().mean()),
        "folded_routers": len(folded_parameters(model)),
    }


def refuse_differences(checks: dict[str, float | bool]) -> None:
    """Refuse saved checkpoints that do not compute what the model does, up to rounding.

    Raises:
        EvaluationError: If the reloaded one differs at all, or the folded one in more than 0.1% of the choices, or by
            more than 1e-5 of the largest logit.
    """
    exact = checks["reload_max_difference"] == 0
    close = checks["folded_max_difference"] <= 1e-5 * max(1.0, checks["max_logit"])
    if not (exact and close and checks["folded_same_choices"] >= 0.999):
        raise EvaluationError(f"quickstart: a saved checkpoint does not compute what the model does: {checks}")


def _chosen(router_logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    return router_logits_TE.topk(top_k).indices.sort().values
