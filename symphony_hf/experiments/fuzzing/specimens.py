"""The specimens, tiny and valid: a checkpoint with graphs, one with upcycled modules, and an adapter."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
)

from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.symphonize import symphonize
from symphony_hf.patching.upcycle_modules import upcycle_modules
from symphony_hf.recipe import PeftSection
from symphony_hf.training.models import add_adapters

SPECIMENS = ("graphs", "upcycled", "adapter")
_SHAPE = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def make_specimens(folder: Path) -> None:
    """Write each specimen into a subfolder of its name."""
    torch.manual_seed(0)
    config = MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)
    _move(symphonize(AutoModelForCausalLM.from_config(config), warmup_steps=10)).save_pretrained(folder / "graphs")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    llava = LlavaConfig(vision_config=vision, text_config=OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2))
    model = upcycle_modules(AutoModelForImageTextToText.from_config(llava), "*multi_modal_projector")
    _move(symphonize(model, normalization="conditional")).save_pretrained(folder / "upcycled")
    adapted = add_adapters(symphonize(make_base(), warmup_steps=10), PeftSection(router="train", r=2))
    _move(adapted)
    adapted.save_pretrained(folder / "adapter")


def make_base() -> PreTrainedModel:
    """Build the base model of the adapter."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(OlmoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2))


@torch.no_grad()
def _move(model: Any) -> Any:
    """Fill every graph with the values of a trained one."""
    for module in model.modules():
        if isinstance(module, ExpertGraph):
            random_EE = torch.rand(module.num_experts, module.num_experts)
            module.adjacency.copy_(random_EE + random_EE.T)
            module.updates.fill_(5)
    return model
