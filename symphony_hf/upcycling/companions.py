"""The files beside the weights: config, generation config, tokenizer, chat template, license."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from ..errors import CheckpointError
from ..json_objects import read_object

CARRIED = (
    "LICENSE*",
    "NOTICE*",
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.*",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer*",
    "vocab.*",
)
"""Patterns of the names of what is carried over. A model card is not: it is about another model."""


def carry_files(source: Path, folder: Path) -> None:
    """Copy what stays true of the upcycled model."""
    found = sorted({path for pattern in CARRIED for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def carried_bytes(source: Path) -> int:
    """What `carry_files` needs on the disk."""
    found = {file for pattern in CARRIED for path in source.glob(pattern) for file in (path, *path.rglob("*"))}
    return sum(file.stat().st_size for file in found if file.is_file())


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json, and a generation config if the dense checkpoint has none: as the stock class does."""
    config.save_pretrained(folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def keep_tokenizer_class(source: Path, folder: Path) -> list[str]:
    """Make sure that the same class reads the tokenizer's files.

    Transformers chooses it by the tokenizer's config and by the model's family, which is another one now.

    Returns:
        Notes for the user: that the tokenizer could not be read here.
    """
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return []
    try:
        wanted, found = (type(AutoTokenizer.from_pretrained(place)).__name__ for place in (source, folder))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        return [f"the tokenizer's files were carried over, but could not be read here ({reason})"]
    if wanted != found:
        settings = read_object(file, CheckpointError) | {"tokenizer_class": wanted}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return []
