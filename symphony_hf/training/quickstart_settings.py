"""The settings of `symphony quickstart`, apart from the run: the command line reads them without the run's imports."""

import dataclasses
import shlex
from dataclasses import dataclass

from symphony_hf.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Sizes and lengths of the quickstart. The defaults take under six minutes on two CPU cores.

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
    seed: int = 0
    pretrain_steps: int = 600
    finetune_steps: int = 300
    batch_size: int = 16
    block_size: int = 128
    vocab_size: int = 2048
    documents: int = 60
    attack_rate: float = 0.015

    def __post_init__(self) -> None:
        for name in ("pretrain_steps", "finetune_steps", "batch_size", "documents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"quickstart: `{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"quickstart: `seed` must be between 0 and 2**32 - 1, got {self.seed}")

    def command_line(self) -> str:
        """Return the command that repeats this run, without the options that are at their defaults."""
        changed = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: value for name, value in changed.items() if value != getattr(type(self), name)}
        return shlex.join(
            ["symphony", "quickstart", *(word for name, value in changed.items() for word in (f"--{name}", str(value)))]
        )
