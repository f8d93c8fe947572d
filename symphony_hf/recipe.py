"""A recipe: a YAML file that says which model is trained on what, and how. Data, no logic."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .config import SymphonyConfig, from_mapping
from .errors import ConfigError, nearest

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


def _check_whole(section: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{section}: `{name}` must be a whole number of at least {low}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model: a checkpoint, or a config to build one from, with random weights.

    Args:
        path: A checkpoint's folder, or its name on the Hub.
        revision: Branch, tag or commit on the Hub.
        config: `model_type` and the fields of that family's config; the vocabulary's size comes from the tokenizer.
        dtype: Of the weights: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
    """

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError(
                "model: give either `path`, a checkpoint, or `config`, to build from; got both or neither"
            )
        if self.config is not None and "model_type" not in self.config:
            raise ConfigError("model: `config` needs a `model_type`, such as olmoe or mixtral")
        known = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise ConfigError(f"model: `dtype` is {self.dtype!r}; {nearest(str(self.dtype), known)}")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which text.

    Args:
        path: A text file, a folder of them, or a data set's name on the Hub; the library sources of the running
            Python when None.
        text_column: Of a data set.
        block_size: Tokens of one training sequence.
        vocab_size: Of the tokenizer that is trained when the model is built from a config.
    """

    path: str | None = None
    text_column: str = "text"
    block_size: int = 256
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        _check_whole("data", "block_size", self.block_size, 2)
        _check_whole("data", "vocab_size", self.vocab_size, 300)


@dataclass(frozen=True, kw_only=True)
class LaunchSection:
    """What the recipe counts on; a run that turns out otherwise is refused.

    Args:
        processes: How many train together; any number when None.
        strategy: `single`, `ddp`, `fsdp`, `zero1`, `zero2` or `zero3`; any when None.
    """

    processes: int | None = None
    strategy: str | None = None

    def __post_init__(self) -> None:
        if self.processes is not None:
            _check_whole("launch", "processes", self.processes, 1)
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise ConfigError(f"launch: `strategy` is {self.strategy!r}; {nearest(str(self.strategy), STRATEGIES)}")


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """What is measured after training, on the test split.

    Args:
        documents: How many documents at most; all when None.
        attack_rate: Share of a line's words that the attack replaces.
        attack_minimum: Words replaced per line at least.
        seed: Of the attack and of the bootstrap.
    """

    documents: int | None = 200
    attack_rate: float = 0.015
    attack_minimum: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.documents is not None:
            _check_whole("eval", "documents", self.documents, 1)
        _check_whole("eval", "attack_minimum", self.attack_minimum, 0)
        _check_whole("eval", "seed", self.seed, 0)
        rate = self.attack_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ConfigError(f"eval: `attack_rate` must be a number between 0 and 1, got {rate!r}")


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Where the results go.

    Args:
        directory: Checkpoints, `results.json` and the trained model in `final/`.
    """

    directory: str = "runs/symphony"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Args:
        model: Which model.
        symphony: How it is routed; null leaves it plain. A baseline is the same recipe with `strength: 0`.
        data: Which text.
        launch: What must run.
        train: Settings of transformers' TrainingArguments, by their own names.
        eval: What is measured at the end.
        output: Where the results go.
    """

    model: ModelSection
    symphony: SymphonyConfig | None = field(default_factory=SymphonyConfig)
    data: DataSection = field(default_factory=DataSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)


_SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "launch": LaunchSection,
    "eval": EvalSection,
    "output": OutputSection,
}


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: Of the YAML file.
        overrides: `section.name` -> value; a name without a section is the train section's.

    Raises:
        ConfigError: If the file cannot be read, or a section, a setting or a value is not known.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe `{path}`: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe `{path}` is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe `{path}`: expected sections by name, got {type(values).__name__}")
    for name, value in (overrides or {}).items():
        section, _, setting = name.rpartition(".")
        settings = values.get(section or "train") or {}
        if not isinstance(settings, dict):
            raise ConfigError(f"recipe `{path}`: {section or 'train'}: expected settings by name, got {settings!r}")
        values[section or "train"] = {**settings, setting: value}
    return _build(values, str(path))


def _build(values: dict[str, Any], where: str) -> Recipe:
    known = [section.name for section in fields(Recipe)]
    for name in values:
        if name not in known:
            raise ConfigError(f"recipe `{where}`: unknown section `{name}`; {nearest(str(name), known)}")
    built: dict[str, Any] = {
        name: from_mapping(cls, values[name] or {}, f"recipe `{where}`: {name}")
        for name, cls in _SECTIONS.items()
        if name in values
    }
    if "symphony" in values:
        settings = values["symphony"]
        where_symphony = f"recipe `{where}`: symphony"
        built["symphony"] = None if settings is None else SymphonyConfig.from_dict(settings, where_symphony)
    if "train" in values:
        if not isinstance(values["train"] or {}, dict):
            raise ConfigError(f"recipe `{where}`: train: expected settings by name, got {values['train']!r}")
        built["train"] = values["train"] or {}
    return from_mapping(Recipe, built, f"recipe `{where}`")
