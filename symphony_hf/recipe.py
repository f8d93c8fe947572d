"""Recipes: YAML files with the settings of a training run, in one dataclass per section."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .config import SymphonyConfig
from .errors import ConfigError
from .recipe_files import OPTIONAL, read_sections
from .settings import parse_settings

Strategy = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
DataKind = Literal["text", "chat", "glue", "llava"]


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Model to train: a checkpoint, or a config to build a model with random weights from.

    Args:
        path: Folder of a checkpoint, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
        config: `model_type` and fields of that family's config. Without `path`, the model is built from it, with the
            vocabulary size of the tokenizer. With `path`, it describes the checkpoint, so that a run can be planned
            before the checkpoint is downloaded, for which `dtype` is needed; the checkpoint must match it.
        tokenizer: Checkpoint whose tokenizer to use; that of `path` when None.
        vision: Checkpoint of a vision tower (CLIP, SigLIP). A LLaVA is built from it and the language model of `path`,
            with a new projector.
        trainable: Shell-style patterns of names of trainable parameters (`*projector*`); all when None. Without `peft`.
        upcycle_modules: Settings of `symphony_hf.upcycle_modules`, for MLPs of the model that become experts.
        dtype: Dtype of the weights; `auto` for that of the checkpoint, or float32 without one.
        quantization: `nf4`: 4-bit experts and linear layers.
        attention: `attn_implementation` of transformers.
        experts: `experts_implementation` of transformers.
    """

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    vision: str | None = None
    trainable: list[str] | None = None
    upcycle_modules: dict[str, Any] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4"] | None = None
    attention: str | None = None
    experts: str | None = None

    def __post_init__(self) -> None:
        given = self.path is not None or self.config is not None
        _check(given, "give `path`, a checkpoint, or `config`, to build one from; got neither")
        if self.config is not None:
            _check("model_type" in self.config, "`config` needs a `model_type`, such as olmoe or mixtral")
        if self.path is None:
            needs = [name for name in ("revision", "vision", "quantization") if getattr(self, name) is not None]
            _check(not needs, f"`{', '.join(needs)}` needs `path`, a checkpoint")
        _check(None in (self.vision, self.quantization), "`quantization` is not supported with `vision`: leave out one")


@dataclass(frozen=True, kw_only=True)
class PeftSection:
    """LoRA adapters. Without this section, all parameters are trained.

    Args:
        router: `graph`: routers are frozen and their graphs are updated. `train`: routers are trained too.
        attention: Whether attention gets adapters.
        experts: Whether experts get adapters.
        r: Rank.
        alpha: Scale; twice the rank when None.
        dropout: Dropout on the adapters' input. Must be 0 with `experts`.
    """

    router: Literal["graph", "train"] = "graph"
    attention: bool = True
    experts: bool = False
    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self.r >= 1, f"`r` must be at least 1, got {self.r}")
        _check(self.alpha is None or self.alpha >= 1, f"`alpha` must be at least 1, got {self.alpha}")
        _check(0 <= self.dropout < 1, f"`dropout` must be from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Data to train and evaluate on.

    Args:
        kind: `text`: documents in blocks. `chat`: conversations or text, with TRL's SFTTrainer. `glue`: sentences and
            labels of a GLUE task. `llava`: conversations about images, in LLaVA's JSON.
        path: File, folder, or name of a data set on the Hub. When None, data that needs no download: the running
            Python's library for `text` and `chat`, scikit-learn's handwritten digits for `llava`.
        name: Configuration of the data set on the Hub, or the task for `glue`: qnli, sst2, wnli, ...
        revision: Branch, tag or commit on the Hub.
        text_column: Column of text in a data set of kind `text`, or in one of kind `chat` without conversations.
        rows: Kind of rows of a `text` data set: `documents`, or `lines` of one text, which is cut as a text file is.
        images: Folder of the images of `llava`; that of the JSON when None.
        block_size: Maximum number of tokens of a training sequence.
        packing: Whether several short examples share a sequence, each attending only to itself.
        streaming: Whether to read a `text` data set during training, for one that does not fit on the disk.
        limit: Maximum number of examples of each split.
        vocab_size: Maximum vocabulary size of the tokenizer that is trained on the data if the model is built from a
            config, without `model.tokenizer`.
        tokenizer: Kind of that tokenizer: `bpe` for subwords, `words` for words separated by whitespace, `characters`.
        damage: `attack` and `rate` of damage to the input of training, which is not scored there.
    """

    kind: DataKind = "text"
    path: str | None = None
    name: str | None = None
    revision: str | None = None
    text_column: str = "text"
    rows: Literal["documents", "lines"] = "documents"
    images: str | None = None
    block_size: int = 256
    packing: bool = False
    streaming: bool = False
    limit: int | None = None
    vocab_size: int = 4096
    tokenizer: Literal["bpe", "words", "characters"] = "bpe"
    damage: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check(self.block_size >= 2, f"`block_size` must be at least 2, got {self.block_size}")
        _check(self.vocab_size >= 300, f"`vocab_size` must be at least 300, got {self.vocab_size}")
        _check(self.limit is None or self.limit >= 1, f"`limit` must be at least 1, got {self.limit}")
        whole_text = self.kind == "text" and not self.streaming
        is_read_whole = whole_text and self.path is not None
        lines = "`rows: lines` needs `kind: text` with a `path`, and no `streaming`"
        _check(is_read_whole or self.rows != "lines", lines)
        reads_text = self.kind in ("text", "chat") or self.text_column == "text"
        _check(reads_text, f"`text_column` has no effect on data of kind `{self.kind}`, got {self.text_column!r}")
        _check(self.kind != "glue" or self.name is not None, "`glue` needs `name`: qnli, sst2, wnli, ...")


@dataclass(frozen=True, kw_only=True)
class LaunchSection:
    """Launch that the recipe requires; a run under another launch is refused.

    Args:
        processes: Number of processes; any number when None.
        strategy: Parallelism strategy; any when None.
    """

    processes: int | None = None
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        _check(self.processes is None or self.processes >= 1, f"`processes` must be at least 1, got {self.processes}")


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Evaluation after training, on the test split. All but `seed` is for data of kind `text`.

    Args:
        documents: Maximum number of documents; all when None.
        context: Number of tokens before a window that it is conditioned on and that are not scored in it, with the
            documents concatenated. With 0, each window of each document is scored without context.
        attack_rate: Share of a line's words that the attack replaces.
        attack_minimum: Minimum number of words replaced per line.
        seed: Seed of the attack and of the bootstrap.
    """

    documents: int | None = 200
    context: int = 0
    attack_rate: float = 0.015
    attack_minimum: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.documents is None or self.documents >= 1, f"`documents` must be at least 1, got {self.documents}")
        _check(0 <= self.attack_rate <= 1, f"`attack_rate` must be between 0 and 1, got {self.attack_rate}")
        for name in ("attack_minimum", "seed", "context"):
            _check(getattr(self, name) >= 0, f"`{name}` must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Output of the run.

    Args:
        directory: Folder for checkpoints, `report.md`, `results.json` and the trained model in `final/`.
    """

    directory: str = "runs/symphony"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run, by section.

    Args:
        model: Model to train.
        symphony: Symphony routing; null or false for the model's own routing. A baseline is the same recipe with
            `strength: 0`.
        peft: Adapters; null or false trains all parameters.
        data: Data to train and evaluate on.
        launch: Launch that the recipe requires.
        train: Settings of transformers' TrainingArguments, or of TRL's SFTConfig for data of kind `chat`.
        eval: Evaluation at the end.
        output: Output of the run.
    """

    model: ModelSection
    symphony: SymphonyConfig | None = field(default_factory=SymphonyConfig)
    peft: PeftSection | None = None
    data: DataSection = field(default_factory=DataSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained on the data: the model is built, and none is named."""
        return self.model.path is None and self.model.tokenizer is None

    def __post_init__(self) -> None:
        alone = "model: `trainable` has no effect with `peft`, which trains adapters: leave out one of them"
        _check(None in (self.model.trainable, self.peft), f"{alone}; `peft.router: train` trains the routers, too")
        context, block_size = self.eval.context, self.data.block_size
        _check(context < block_size, f"eval: `context` must leave room in a block of {block_size}, got {context}")
        for name in () if self.data.kind == "text" else ("documents", "context", "attack_rate", "attack_minimum"):
            value, default = getattr(self.eval, name), getattr(EvalSection, name)
            _check(
                value == default,
                f"eval: `{name}: {value}` has no effect on data of kind `{self.data.kind}`, whose held-out rows are "
                "all scored as they are: leave it out, or set `data.limit`",
            )


SECTIONS = {
    "model": ModelSection,
    "symphony": SymphonyConfig,
    "peft": PeftSection,
    "data": DataSection,
    "launch": LaunchSection,
    "eval": EvalSection,
    "output": OutputSection,
}


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    `base: other.yaml` names another recipe, relative to this one, whose settings this one overrides. `~` at the
    beginning of a local path is the home folder.

    Args:
        path: Path of the YAML file.
        overrides: `section.name` -> value. A name without a section belongs to the train section.

    Raises:
        ConfigError: If a file cannot be read, or a section, a setting or a value is invalid.
    """
    known = [section.name for section in fields(Recipe)]
    values, where = read_sections(Path(path), overrides or {}, known), f"recipe `{path}`"
    if "model" not in values:
        raise ConfigError(f"{where}: `model` is missing")
    built: dict[str, Any] = {}
    for name, settings in values.items():
        if settings is None and name in OPTIONAL:
            built[name] = None
        elif name == "train":
            built[name] = settings or {}
        else:
            built[name] = parse_settings(SECTIONS[name], settings or {}, f"{where}: {name}")
    return Recipe(**built)
