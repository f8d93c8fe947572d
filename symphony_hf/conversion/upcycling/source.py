"""The dense checkpoint: finding, reading and checking it, and copying its other files."""

import copy
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from symphony_hf.checkpoints.model_class import INVALID_CONFIG
from symphony_hf.errors import UNREADABLE, CheckpointError, UpcycleError
from symphony_hf.files import TOKENIZER_CONFIG, read_object

from .checkpoint import Checkpoint, StoredTensor, check_tensors
from .families import CONVERSIONS

_VOCABULARY = ("merges.txt", "spiece.model", "tekken.json", "tokenizer*", "vocab.*")
CARRIED = (
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.*",
    "generation_config.json",
    "special_tokens_map.json",
    *_VOCABULARY,
)
"""Name patterns of the files that are copied. The model card is not: it describes another model."""


def carry_files(source: Path, folder: Path) -> None:
    """Copy the files that also apply to the upcycled model."""
    found = sorted({path for pattern in CARRIED for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def carried_bytes(source: Path) -> int:
    """Return the bytes that `carry_files` copies."""
    found = {file for pattern in CARRIED for path in source.glob(pattern) for file in (path, *path.rglob("*"))}
    return sum(file.stat().st_size for file in found if file.is_file())


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json, and a generation config if the dense checkpoint has none."""
    config.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def keep_tokenizer_class(source: Path, folder: Path) -> list[str]:
    """Make sure that the same class reads the tokenizer's files. Returns notes if the tokenizer cannot be read.

    transformers selects the class by the tokenizer's config and the model's family, which has changed.
    """
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARY):
        return []
    try:
        wanted, found = (type(AutoTokenizer.from_pretrained(path)).__name__ for path in (source, folder))
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        return [f"the tokenizer's files were copied, but could not be read here ({type(error).__name__}: {reason})"]
    if wanted != found:
        file = folder / TOKENIZER_CONFIG
        settings = (read_object(file, CheckpointError) if file.exists() else {}) | {"tokenizer_class": wanted}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return []


_EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
CONFIG = ("config.json",)
_STORED = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")  # not a vendor's own form
WHOLE = (*CONFIG, *_STORED, *CARRIED, "additional_chat_templates/*")
"""Name patterns of the files to download: to check whether a model can be upcycled, and to upcycle it."""


@dataclass(frozen=True)
class DenseModel:
    """Dense checkpoint, and the tensors to convert by name, without a tied LM head and computed buffers."""

    checkpoint: Checkpoint
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]


def find_folder(source: str | Path, revision: str | None, patterns: Sequence[str] = WHOLE) -> Path:
    """Return the folder of a checkpoint, downloading files of these patterns if it is a name on the Hub.

    A downloaded folder is named after the commit.

    Raises:
        CheckpointError: If there is no such folder, and no such model can be downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        huggingface_hub.utils.validate_repo_id(str(source))
    except HFValidationError:
        raise CheckpointError(f"upcycle: `{source}`: no such folder, and not the name of a model on the Hub") from None
    try:
        return Path(huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=[*patterns]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"upcycle: `{source}`: no such folder, and no model of the Hub that can be downloaded ({reason}); check "
            "the spelling and the network, or give the folder of a downloaded checkpoint"
        ) from error


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a dense checkpoint.

    Raises:
        CheckpointError: If it is missing or invalid.
        UpcycleError: If the model is quantized, a MoE, or of an unknown family.
    """
    values = read_object(folder / "config.json", CheckpointError, hint=f"is `{folder}` a model's folder?")
    model_type = str(values.get("model_type"))
    if values.get("quantization_config") is not None:
        raise UpcycleError(
            f"upcycle: `{folder}` is quantized (`quantization_config`): use the checkpoint that it was made from"
        )
    experts = sorted(name for name, value in values.items() if _EXPERTS.fullmatch(name) and value)
    if experts or model_type in {conversion.container.model_type for conversion in CONVERSIONS}:
        said = f"`{experts[0]}: {values[experts[0]]}`" if experts else f"`model_type: {model_type}`"
        raise UpcycleError(f"upcycle: `{folder}` is a MoE already ({said}): only dense checkpoints are upcycled")
    if model_type not in {conversion.source.model_type for conversion in CONVERSIONS}:
        known = ", ".join(sorted({conversion.source.model_type for conversion in CONVERSIONS}))
        raise UpcycleError(f"upcycle: `{folder}` is a `{model_type}`; the families that can be upcycled are {known}")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_pretrained(folder)
    except INVALID_CONFIG as error:
        raise CheckpointError(f"`{folder / 'config.json'}`: transformers refuses it: {error}") from error
    return config


def open_dense(folder: Path, config: PreTrainedConfig) -> DenseModel:
    """Open a dense checkpoint and compare its tensors with those of its model class.

    Raises:
        CheckpointError: If files or tensors are missing, truncated, unexpected, or of another shape.
        UpcycleError: If tensors are quantized, or tied and different.
    """
    checkpoint = Checkpoint(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in meta_model(config).state_dict().items()}
    tied = _TIED if config.tie_word_embeddings else {}
    check_tensors(checkpoint, expected, tied)
    return DenseModel(checkpoint, config, {name: checkpoint.tensors[name] for name in expected if name not in tied})


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the stock causal language model of a config in float32, without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # transformers sets its `dtype`
            dtype=torch.float32,
            experts_implementation="eager",
        )
    return model.eval()
