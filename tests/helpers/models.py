"""Tiny models, built from their configs with seeded random weights, and small batches for them."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
}


def make_config(family, **overrides):
    class_name, settings = CONFIGS[family]
    return getattr(transformers, class_name)(**{**COMMON, **settings, **overrides})


def make_model(family="olmoe", *, seed=0, dtype=torch.float32, experts="grouped_mm", **overrides):
    torch.manual_seed(seed)
    config = make_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)
    with torch.no_grad():
        # Routers far from ties, so that one rounding does not change who is chosen.
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)
    return model.eval()


def make_llava(family="olmoe", *, seed=0, vision_layers=2):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=make_config(family), image_token_index=VOCAB - 1)
    return AutoModelForImageTextToText.from_config(config).eval()


def make_ids(rows=2, length=12, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB - 1, (rows, length), generator=generator)


def llava_inputs(rows=2, *, seed=0):
    """Four image tokens (an 8 x 8 image in 4 x 4 patches), then text."""
    ids = make_ids(rows, 10, seed=seed)
    ids[:, 1:5] = VOCAB - 1
    pixels = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def move_graphs(model, *, seed=0):
    """Put a random co-selection graph into every router, as long training would leave one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            graph = getattr(module, "symphony", None)
            if isinstance(graph, torch.nn.Module):
                random = torch.rand(graph.num_experts, graph.num_experts, generator=generator)
                graph.adjacency.copy_(random + random.T)
    return model


def assert_folded(folded, symphony):
    """Compare the float32 logits of a folded model with those of the model it was folded from.

    One multiplies by A W, the other smooths the logits: equal up to the rounding of sums. In 16 bits both multiply by
    A W, and tests compare bits.
    """
    torch.testing.assert_close(folded, symphony, rtol=0, atol=1e-5 * max(1.0, float(symphony.detach().abs().max())))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
