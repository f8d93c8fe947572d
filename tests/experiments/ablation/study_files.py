"""A study that takes a second: a tiny model on a few generated documents."""

import random
from pathlib import Path

RECIPE = """
model:
  config: {model_type: wikitext_moe, use_cache: false, hidden_size: 16, intermediate_size: 8, num_hidden_layers: 2,
    num_attention_heads: 2, attention_span: 8, num_experts: 4, dropout: 0.1}
symphony: {balance_loss_weight: 0.0, z_loss_weight: 0.0}
data: {path: TEXT, tokenizer: words, vocab_size: 300, block_size: 16}
train: {max_steps: 6, per_device_train_batch_size: 2, learning_rate: 0.01, warmup_steps: 2,
  lr_scheduler_type: constant_with_warmup, max_grad_norm: 0}
eval: {attack_rate: 0.1, attack_minimum: 1, seed: 0, documents: 3}
"""


def write_text(folder: Path, seed: int = 0) -> Path:
    """A folder of generated documents."""
    generator = random.Random(seed)
    words = [f"word{index}" for index in range(40)]
    for split, count in (("train", 40), ("test", 6)):
        for number in range(count):
            path = folder / split / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [" ".join(generator.choices(words, k=11)) for _ in range(4)]
            path.write_text("\n".join(lines) + "\n")
    return folder


def write_study(folder: Path, study: str) -> Path:
    """A study beside its recipe and its text."""
    write_text(folder / "text")
    (folder / "recipe.yaml").write_text(RECIPE.replace("TEXT", str(folder / "text")))
    path = folder / "study.yaml"
    path.write_text(f"recipe: recipe.yaml\n{study}\n")
    return path
