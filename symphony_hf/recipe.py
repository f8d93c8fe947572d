"""A recipe: a YAML file that says which model is trained on what, and how. Data, no logic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import SymphonyConfig, check_names, parse_settings
from .errors import ConfigError, nearest

Strategy = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
DataKind = Literal["text", "chat", "glue", "llava"]


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model: a checkpoint, or a config to build one from, with random weights.

    Args:
        path: A checkpoint's folder, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
        config: `model_type` and the fields of that family's config. Without `path` the model is built from it; the
            vocabulary's size then comes from the tokenizer. With `path` it is what the checkpoint must be, by which
            a plan is made before the checkpoint is there.
        tokenizer: Another checkpoint's; that of `path` when None.
        vision: A vision tower's checkpoint (CLIP, SigLIP): LLaVA is built of it and the language model of `path`,
            with a new projector.
        trainable: Patterns of parameter names, as in a shell (`*projector*`), that are trained; all when None.
        upcycle_modules: Settings of `symphony_hf.upcycle_modules`, for the model's own MLPs that become experts.
        dtype: Of the weights; `auto` for the checkpoint's own.
        quantization: `nf4`: 4-bit experts and linear layers.
        attention: transformers' `attn_implementation`.
        experts: transformers' `experts_implementation`.
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


@dataclass(frozen=True, kw_only=True)
class PeftSection:
    """LoRA adapters; without this section all parameters are trained.

    Args:
        router: `graph`: routers stay as they are, and their graphs move. `train`: routers are trained too.
        attention: Whether attention gets adapters.
        experts: Whether experts do.
        r: Rank.
        alpha: Scale; twice the rank when None.
        dropout: On the adapters' input; must be 0 with `experts`.
    """

    router: Literal["graph", "train"] = "graph"
    attention: bool = True
    experts: bool = False
    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check(self.r >= 1, f"`r` must be at least 1, got {self.r}")
        _check(0 <= self.dropout < 1, f"`dropout` must be from 0 to below 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which data.

    Args:
        kind: `text`: documents in blocks. `chat`: conversations, by TRL's SFTTrainer. `glue`: sentences and labels of
            a GLUE task. `llava`: conversations about images, in LLaVA's own JSON.
        path: A file, a folder, or a data set's name on the Hub; when None, data that is on every machine: for
            `text` and `chat` of the running Python's library, for `llava` scikit-learn's handwritten digits.
        name: The data set's configuration on the Hub; for `glue` the task: qnli, sst2, wnli, ...
        revision: Branch, tag or commit on the Hub.
        text_column: Column of text in a data set of kind `text`, or in one of kind `chat` without conversations.
        rows: What its rows are: `documents`, or `lines` of one text, blank ones too, as WikiText has them; such a text
            is cut into documents as a text file is.
        images: Of `llava`: the folder that the image names are in; the JSON's own when None.
        block_size: Tokens of one training sequence, at most.
        packing: Whether several short examples share a sequence, each attending to itself alone.
        streaming: Whether a data set is read while training goes on, for one that does not fit on the disk.
        limit: Examples of each split at most.
        vocab_size: Of the tokenizer that is trained when the model is built from a config.
        tokenizer: Which one that is: `bpe`, of pieces of words, or `words`, of what whitespace separates.
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
    tokenizer: Literal["bpe", "words"] = "bpe"

    def __post_init__(self) -> None:
        _check(self.block_size >= 2, f"`block_size` must be at least 2, got {self.block_size}")
        _check(self.vocab_size >= 300, f"`vocab_size` must be at least 300, got {self.vocab_size}")
        _check(self.limit is None or self.limit >= 1, f"`limit` must be at least 1, got {self.limit}")
        lines = self.rows == "lines"
        _check(not lines or (self.kind == "text" and not self.streaming), "`rows: lines` is of unstreamed `text`")
        reads_text = self.kind in ("text", "chat") or self.text_column == "text"
        _check(reads_text, f"`text_column` has no effect on data of kind `{self.kind}`, got {self.text_column!r}")
        _check(self.kind != "glue" or self.name is not None, "`glue` needs `name`: qnli, sst2, wnli, ...")


@dataclass(frozen=True, kw_only=True)
class LaunchSection:
    """What the recipe counts on; a run that turns out otherwise is refused.

    Args:
        processes: How many train together; any number when None.
        strategy: How; any way when None.
    """

    processes: int | None = None
    strategy: Strategy | None = None

    def __post_init__(self) -> None:
        known = self.processes is None or self.processes >= 1
        _check(known, f"`processes` must be at least 1, got {self.processes}")


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """What is measured after training, on the test split.

    Args:
        documents: How many documents at most; all when None.
        context: Tokens before a window that it is read with and that are not scored in it, the documents being one
            text; with 0 each document is read by itself, and a window of it, too. Of data of kind `text`.
        attack_rate: Share of a line's words that the attack replaces.
        attack_minimum: Words replaced per line at least.
        seed: Of the attack and of the bootstrap.
    """

    documents: int | None = 200
    context: int = 0
    attack_rate: float = 0.015
    attack_minimum: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        some = self.documents is None or self.documents >= 1
        _check(some, f"`documents` must be at least 1, got {self.documents}")
        rate = self.attack_rate
        _check(0 <= rate <= 1, f"`attack_rate` must be between 0 and 1, got {rate}")
        for name in ("attack_minimum", "seed", "context"):
            _check(getattr(self, name) >= 0, f"`{name}` must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Where the results go.

    Args:
        directory: Checkpoints, `report.md`, `results.json` and the trained model in `final/`.
    """

    directory: str = "runs/symphony"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Args:
        model: Which model.
        symphony: How it is routed; null leaves it plain. A baseline is the same recipe with `strength: 0`.
        peft: Adapters; null trains all parameters.
        data: Which data.
        launch: What must run.
        train: Settings of transformers' TrainingArguments, by their own names.
        eval: What is measured at the end.
        output: Where the results go.
    """

    model: ModelSection
    symphony: SymphonyConfig | None = field(default_factory=SymphonyConfig)
    peft: PeftSection | None = None
    data: DataSection = field(default_factory=DataSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)

    def __post_init__(self) -> None:
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
_MAY_BE_NULL = ("symphony", "peft")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    A recipe may begin with `base: other.yaml`, a recipe beside it, from which it differs by the settings that follow.

    Args:
        path: Of the YAML file.
        overrides: `section.name` -> value; a name without a section is the train section's.

    Raises:
        ConfigError: If a file cannot be read, or a section, a setting or a value is not known.
    """
    path = Path(path)
    values = _read(path, ())
    for name, value in (overrides or {}).items():
        section, _, setting = name.partition(".") if "." in name else ("train", "", name)
        _put(values, section, {setting: value}, path)
    return _build(values, f"recipe `{path}`")


def _read(path: Path, seen: Sequence[Path]) -> dict[str, Any]:
    """The sections of a recipe, over those of its base."""
    if path.resolve() in seen:
        raise ConfigError(f"recipe `{path}`: it is its own `base`")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe `{path}`: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe `{path}` is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe `{path}`: expected sections by name, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    below = _read(path.parent / str(base), [*seen, path.resolve()])
    for section, settings in values.items():
        _put(below, section, settings, path)
    return below


def _put(values: dict[str, Any], section: str, settings: Any, path: Path) -> None:
    """Settings of one section over those that are there; null takes the section away."""
    if settings is None:
        values[section] = None
        return
    where = f"recipe `{path}`: {section}"
    values[section] = {**check_names(values.get(section) or {}, None, where), **check_names(settings, None, where)}


def _build(values: dict[str, Any], where: str) -> Recipe:
    known = [section.name for section in fields(Recipe)]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown section `{name}`; {nearest(str(name), known)}")
    if "model" not in values:
        raise ConfigError(f"{where}: `model` is missing")
    built: dict[str, Any] = {}
    for name, settings in values.items():
        if settings is None and name in _MAY_BE_NULL:
            built[name] = None
        elif name == "train":
            built[name] = check_names(settings or {}, None, f"{where}: train")
        else:
            built[name] = parse_settings(SECTIONS[name], settings or {}, f"{where}: {name}")
    return Recipe(**built)
