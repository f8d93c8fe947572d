"""GRPO with router replay: OLMoE-1B-7B learns additions, and each completion is trained by the experts that sampled it.

Rewards of reinforcement learning are functions, so this recipe is a script. It takes every setting of TRL's GRPOConfig:

    python recipes/olmoe-7b-grpo/train.py --smoke
    python recipes/olmoe-7b-grpo/train.py --learning_rate 5e-6 --num_generations 16
"""

import random
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, TrlParser

from symphony_hf import SymphonyCallback, symphonize, with_router_losses, with_router_replay

FULL = {
    "output_dir": "runs/olmoe-7b-grpo",
    "num_iterations": 2,  # the second pass over a batch is off-policy: its ratio is what replay keeps exact
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-6,
    "max_steps": 200,
    "bf16": True,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "report_to": "none",
}
SMOKE = FULL | {
    "output_dir": "runs/smoke/olmoe-7b-grpo",
    "num_generations": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


@dataclass
class Arguments:
    """Arguments beside those of GRPOConfig."""

    model_name_or_path: str = field(default="allenai/OLMoE-1B-7B-0924-Instruct", metadata={"help": "Checkpoint."})
    strength: float = field(default=1.0, metadata={"help": "Strength of the graph; 0 is the baseline."})
    replay: bool = field(default=True, metadata={"help": "Whether training replays the experts of the sampling."})
    questions: int = field(default=2048, metadata={"help": "Number of additions to learn."})
    smoke: bool = field(default=False, metadata={"help": "Train a tiny random model for two steps on a CPU."})


def main() -> None:
    parser = TrlParser((Arguments, GRPOConfig))
    parser.set_defaults(**(SMOKE if "--smoke" in sys.argv else FULL))
    arguments, settings = parser.parse_args_and_config()
    torch.manual_seed(settings.seed)
    model, tokenizer = tiny_model() if arguments.smoke else load(arguments.model_name_or_path)
    symphonize(model, strength=arguments.strength)
    trainer_class = with_router_replay(GRPOTrainer) if arguments.replay else GRPOTrainer
    trainer = with_router_losses(trainer_class)(
        model,
        args=settings,
        reward_funcs=closeness,
        train_dataset=additions(arguments.questions, settings.seed),
        processing_class=tokenizer,
        callbacks=[SymphonyCallback()],
    )
    trainer.train()
    trainer.save_model(f"{settings.output_dir}/final")


def additions(number: int, seed: int) -> Dataset:
    """Return questions such as `17 + 25 =`, with their answers."""
    draw = random.Random(seed)
    pairs = [(draw.randrange(50), draw.randrange(50)) for _ in range(number)]
    return Dataset.from_list([{"prompt": f"{a} + {b} =", "answer": a + b} for a, b in pairs])


def closeness(completions: list[str], answer: list[int], **_: Any) -> list[float]:
    """Reward each completion by its first number: 1 for the answer, less the farther it is, 0 without a number."""
    first = [re.search(r"\d+", text) for text in completions]
    return [
        0.0 if found is None else 1 / (1 + abs(int(found[0]) - right))
        for found, right in zip(first, answer, strict=True)
    ]


def load(path: str) -> tuple[Any, Any]:
    """Return a checkpoint with float32 weights, in which a step of 1e-6 is not rounded away, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def tiny_model() -> tuple[Any, Any]:
    """Return a small OLMoE with random weights, and a tokenizer of digits and signs."""
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"\S"), "isolated")
    characters.decoder = decoders.Fuse()  # digits of one number are read together
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    config = OlmoeConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return OlmoeForCausalLM(config), tokenizer


if __name__ == "__main__":
    main()
