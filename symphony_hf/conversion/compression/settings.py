"""Settings of `symphony merge`, `prune` and `topk`, checked before anything is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from symphony_hf.errors import CheckpointError, ConfigError, nearest
from symphony_hf.evaluation.settings import DTYPES
from symphony_hf.results import check_file_place, check_folder_place
from symphony_hf.settings import changed_settings, check_least, command_line

MERGE_BY = ("graph", "outputs")
PRUNE_BY = ("load", "centrality", "reap")
GRAPHS = ("learned", "counted")
RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Model, and text that it is measured on.

    Args:
        model: Checkpoint of a MoE language model: a folder, or a name on the Hub.
        output: Folder to write the new checkpoint to.
        data: Text file, table, folder, or data set on the Hub; by default the sources of the running Python's library.
            Evaluation is on its test split.
        text_column: Text column of a table.
        documents: Maximum number of test documents to evaluate on, spread evenly over all.
        block_size: Number of tokens in a window, at most the model's context length; by default a quarter of that, and
            at most 1024.
        batch_size: Number of windows in a batch.
        seed: Seed of the bootstrap, and of the choice of calibration text where there is one.
        dtype: Data type of the weights: auto (as stored), float32, bfloat16 or float16.
        tokenizer: Tokenizer, where the model's folder has none.
        revision: Branch, tag or commit of the model on the Hub.
        result: File for the measurements; by default result.json in the output folder.
    """

    model: str
    output: str | None = None
    data: str | None = None
    text_column: str = "text"
    documents: int = 100
    block_size: int | None = None
    batch_size: int = 8
    seed: int = 0
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    result: str | None = None

    command: ClassVar[str] = "compress"

    def __post_init__(self) -> None:
        check_least(self.command, 2, block_size=self.block_size)
        check_least(self.command, 1, documents=self.documents, batch_size=self.batch_size)
        check_least(self.command, 0, seed=self.seed)
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.command}: `dtype` must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def check_output(self) -> Path | None:
        """Return the folder to write, if there is one.

        Raises:
            CheckpointError: If it exists and is not empty.
            ConfigError: If it, or the result file, cannot be written.
        """
        if self.result is not None:
            check_file_place(Path(self.result).expanduser(), self.command)
        if self.output is None:
            return None
        target = Path(self.output).expanduser().absolute()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(f"{self.command}: the output `{target}` exists: give another one, or delete it")
        check_folder_place(target, self.command)
        if self.result is not None and target.is_relative_to(Path(self.result).expanduser().absolute()):
            raise ConfigError(
                f"{self.command}: the result `{self.result}` is the output or a folder of it: give a file"
            )
        return target

    def result_file(self, target: Path, folder: Path) -> Path:
        """Return where to write the result while `target` is being written in `folder`."""
        if self.result is None:
            return folder / RESULT
        file = Path(self.result).expanduser().absolute()
        return folder / file.relative_to(target) if file.is_relative_to(target) else file

    def command_line(self) -> str:
        """Return the command that does this, without the options that are at their defaults."""
        options = changed_settings(self)
        return command_line(self.command, options.pop("model"), *filter(None, [options.pop("output", None)]), **options)


@dataclass(frozen=True, kw_only=True)
class FewerExpertsSettings(TextSettings):
    """Number of experts to leave, criterion, and calibration.

    Args:
        experts: Number of experts to leave in each layer.
        by: Criterion.
        graph: Graph to use: learned, the one saved with the checkpoint, whatever its `graph` setting was; or counted,
            from the calibration text, for any model.
        calibration_tokens: Maximum number of calibration tokens from the train split, rounded down to whole windows (at
            least one).
    """

    experts: int
    by: str
    graph: str = "learned"
    calibration_tokens: int = 65_536

    known_by: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is None:
            raise ConfigError(f"{self.command}: give the folder to write")
        for name, known in (("by", self.known_by), ("graph", GRAPHS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ConfigError(f"{self.command}: `{name}` is {value!r}; {nearest(value, known)}")
        check_least(self.command, 1, experts=self.experts, calibration_tokens=self.calibration_tokens)


@dataclass(frozen=True, kw_only=True)
class MergeSettings(FewerExpertsSettings):
    """Settings of `merge`.

    Args:
        by: Which experts are alike: graph (selected together), or outputs (HC-SMoE).
    """

    command: ClassVar[str] = "merge"
    known_by: ClassVar[tuple[str, ...]] = MERGE_BY


@dataclass(frozen=True, kw_only=True)
class PruneSettings(FewerExpertsSettings):
    """Settings of `prune`.

    Args:
        by: What makes an expert important: load, centrality (in the graph), or reap (gate-weighted output norm).
    """

    command: ClassVar[str] = "prune"
    known_by: ClassVar[tuple[str, ...]] = PRUNE_BY


@dataclass(frozen=True, kw_only=True)
class TopKSettings(TextSettings):
    """Numbers of experts per token to measure.

    Args:
        top_k: Numbers of experts per token to measure; by default all from 1 to the model's own.
        keep: Number of experts per token in the checkpoint that is written; required where several are measured.
    """

    top_k: tuple[int, ...] | None = None
    keep: int | None = None

    command: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and (not self.top_k or len(set(self.top_k)) < len(self.top_k) or min(self.top_k) < 1):
            raise ConfigError(f"topk: `top_k` must be numbers from 1, each once; got {list(self.top_k)}")
        if self.keep is not None:
            check_least(self.command, 1, keep=self.keep)
        if (self.keep is None) == (self.output is not None) and not (self.output and len(self.top_k or ()) == 1):
            raise ConfigError("topk: to write a checkpoint give both its folder and `keep`, the number that it chooses")
        if self.keep is not None and self.top_k is not None and self.keep not in self.top_k:
            raise ConfigError(f"topk: `keep` is {self.keep}, which is not among those tried, {list(self.top_k)}")
