"""One forward of a folded checkpoint from its files alone: JSON, safetensors' format and numpy, in float64.

Written from the published architectures (Mixtral, arXiv 2401.04088; OLMoE, 2409.02060; Qwen2-MoE, 2407.10671;
Qwen3-MoE, 2505.09388), as software that knows the stock names and nothing of this package would. It asks for tensors by
name and keeps account, so that one that nobody reads is seen.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class NaiveReader:
    """A mixture of experts in a folder."""

    def __init__(self, folder):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(file)
        self.unread = set(self.tensors)
        self.family = self.config["model_type"]

    def get(self, name):
        self.unread.discard(name)
        return self.tensors[name].astype(np.float64)

    def linear(self, x, name):
        y = x @ self.get(f"{name}.weight").T
        return y + self.get(f"{name}.bias") if f"{name}.bias" in self.tensors else y

    def norm(self, x, name):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x * self.get(f"{name}.weight")

    def logits(self, ids):
        """Of one sequence. Shape: (tokens, vocabulary)."""
        x = self.get("model.embed_tokens.weight")[ids]
        for number in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            x = x + self.feed_forward(self.norm(x, f"{layer}.post_attention_layernorm"), number, layer)
        x = self.norm(x, "model.norm")
        return x @ self.get("lm_head.weight").T

    def attention(self, x, name):
        heads, shared = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config.get("head_dim") or self.config["hidden_size"] // heads
        q, k, v = (self.linear(x, f"{name}.{letter}_proj") for letter in "qkv")
        if self.family == "olmoe":  # normalizes queries and keys whole
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k, v = (tensor.reshape(len(x), -1, size) for tensor in (q, k, v))
        if self.family == "qwen3_moe":  # head by head
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(tensor, heads // shared, axis=1) for tensor in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), v)
        return self.linear(mixed.reshape(len(x), -1), f"{name}.o_proj")

    def rotate(self, x):
        """Rotary positions, arXiv 2104.09864, with the halves of a head as the pairs."""
        half = x.shape[-1] // 2
        theta = self.config["rope_parameters"]["rope_theta"]
        angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def feed_forward(self, x, number, layer):
        step = self.config.get("decoder_sparse_step", 1)
        if (number + 1) % step:
            return self.gated(x, f"{layer}.mlp", "gate_proj", "up_proj", "down_proj")
        if self.family == "mixtral":
            return self.experts(x, f"{layer}.block_sparse_moe", ("w1", "w3", "w2"), renormalize=True)
        block = f"{layer}.mlp"
        names = ("gate_proj", "up_proj", "down_proj")
        y = self.experts(x, block, names, renormalize=self.config["norm_topk_prob"])
        if self.family == "qwen2_moe":
            shared = self.gated(x, f"{block}.shared_expert", *names)
            y = y + shared / (1 + np.exp(-self.linear(x, f"{block}.shared_expert_gate")))
        return y

    def experts(self, x, block, names, renormalize):
        scores = softmax(self.linear(x, f"{block}.gate"))
        y = np.zeros_like(x)
        for expert in range(scores.shape[-1]):  # read all, chosen or not
            for name in names:
                self.get(f"{block}.experts.{expert}.{name}.weight")
        for token, score in enumerate(scores):
            chosen = np.argsort(-score)[: self.config["num_experts_per_tok"]]
            total = score[chosen].sum() if renormalize else 1.0
            for expert in chosen:
                output = self.gated(x[token], f"{block}.experts.{expert}", *names)
                y[token] += score[expert] / total * output
        return y

    def gated(self, x, name, gate, up, down):
        inner = self.linear(x, f"{name}.{gate}")
        return self.linear(inner / (1 + np.exp(-inner)) * self.linear(x, f"{name}.{up}"), f"{name}.{down}")


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)
