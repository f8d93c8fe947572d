"""Settings of `symphony quickstart`, in a file of their own so that the command line starts without torch."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from symphony_hf.errors import ConfigError
from symphony_hf.settings import changed_settings, check_least, command_line

RECIPE = Path(__file__).with_name("quickstart.yaml")
_RECIPE = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Sizes and lengths of the quickstart, by default its recipe's. They take nine minutes on two CPU cores.

    Args:
        output: Folder for checkpoints, report and pictures.
        data: Text file, folder, or data set on the Hub to use instead of the Python library's own sources.
        seed: Seed of the weights, the batches, the attack and the bootstrap.
        pretrain_steps: Number of optimizer steps of the base model.
        finetune_steps: Number of optimizer steps of each copy.
        batch_size: Number of sequences in a batch.
        block_size: Number of tokens in a sequence.
        vocab_size: Vocabulary size of the tokenizer.
        documents: Maximum number of held-out documents to evaluate on.
        attack_rate: Share of a line's words that the attack replaces.
    """

    output: str = "symphony-quickstart"
    data: str | None = None
    seed: int = _RECIPE["train"]["seed"]
    pretrain_steps: int = 600
    finetune_steps: int = _RECIPE["train"]["max_steps"]
    batch_size: int = _RECIPE["train"]["per_device_train_batch_size"]
    block_size: int = _RECIPE["data"]["block_size"]
    vocab_size: int = _RECIPE["data"]["vocab_size"]
    documents: int = _RECIPE["eval"]["documents"]
    attack_rate: float = _RECIPE["eval"]["attack_rate"]

    def __post_init__(self) -> None:
        names = ("pretrain_steps", "finetune_steps", "batch_size", "documents")
        check_least("quickstart", 1, **{name: getattr(self, name) for name in names})
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"quickstart: `seed` must be between 0 and 2**32 - 1, got {self.seed}")

    def overrides(self, output: Path, steps: int) -> dict[str, object]:
        """Return what a training of so many steps, whose model goes to `output`, changes in the recipe."""
        return {
            "data.path": self.data,
            "data.block_size": self.block_size,
            "data.vocab_size": self.vocab_size,
            "eval.documents": self.documents,
            "eval.attack_rate": self.attack_rate,
            "eval.seed": self.seed,
            "output.directory": str(output),
            "seed": self.seed,
            "max_steps": steps,
            "warmup_steps": max(1, steps // 20),
            "logging_steps": max(1, steps // 30),
            "eval_strategy": "steps",
            "eval_steps": max(1, steps // 5),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "dataloader_pin_memory": False,
        }

    def command_line(self) -> str:
        """Return the command that repeats this run, without the options that are at their defaults."""
        return command_line("quickstart", **changed_settings(self))
