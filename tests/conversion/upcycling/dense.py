"""Tiny dense checkpoints of the families that can be upcycled, and their containers."""

import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from symphony_hf import SymphonyWarning, upcycle

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
DENSE = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, windows and wide heads": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "llama": ("Llama", {"rms_norm_eps": 1e-3}),
    "llama, tied and scaled": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied and scaled": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_bias": True,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3, windows": ("Phi3", {"sliding_window": 5, "num_key_value_heads": 4}),
    "phi3, longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
}


def make_dense(kind="phi3", *, dtype=torch.float32, seed=0, **overrides):
    """Build a model in which every weight matters: none is zero, and no layer changes its input only a little."""
    name, settings = DENSE[kind]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **settings, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * random if "norm" in name else 0.2 * random)
    return model.to(dtype).eval()


def save_dense(folder, kind="phi3", *, dtype=torch.float32, seed=0, max_shard_size="5GB", **overrides):
    """Write a dense checkpoint, and return the model and its folder."""
    model = make_dense(kind, dtype=dtype, seed=seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model, Path(folder)


def run(source, target, **options):
    """Call `upcycle` without its warnings, which are also in `notes`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymphonyWarning)
        return upcycle(source, target, **{"num_experts": 3, **options})


def load(folder, dtype="auto"):
    """Load a checkpoint with the stock class, as any tool built on transformers does."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model, length=40):
    """Compute the logits of a sequence longer than the windows and than the original length of the rotations."""
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def files_of(folder):
    """Return the bytes of each file in a folder by relative path; empty if there is no folder."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
