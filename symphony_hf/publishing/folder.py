"""What a folder is, before any of it leaves the machine: which model, and which of its files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..config import SymphonyConfig
from ..errors import GraphError, PushError
from ..graph_files import read_graphs
from ..json_objects import read_object
from ..routing import adjacency_problems
from .contents import check_contents, is_wanted

Kind = Literal["symphony", "plain", "adapter"]
RECORD_NAME = "symphony_config.json"
"""Beside an adapter with graphs: what it needs to be loaded."""
_WIKITEXT = "wikitext_moe"
_AUTO_CLASSES = {  # and transformers' table of each
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",  # a model with images comes whole
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
_RUNS = {"final": "results.json", "symphony": "report.json", "folded": "report.json", "plain": "report.json"}
"""Where a run keeps its model, and beside it what it has measured: the recipes' runner, and the quickstart."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on the disk, as it is pushed.

    Attributes:
        path: Where its config is.
        kind: `symphony`: with its graphs. `plain`: without, folded or never with any. `adapter`: PEFT's.
        config: Of the model; of the adapter, where it is one.
        settings: Of the graphs, where the config has them.
        graphs: Router -> adjacency; of the model that was folded, where it is known. Empty where there are none.
        files: Name in the repository -> file.
        left_out: Name -> why it stays here.
        results: The file with what a run has measured.
    """

    path: Path
    kind: Kind
    config: Mapping[str, Any]
    settings: SymphonyConfig | None
    graphs: Mapping[str, Tensor]
    files: Mapping[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict)
    results: Path | None = None

    @property
    def has_our_modules(self) -> bool:
        """Whether no other software has its modules: `upcycle_modules` made them, or it is WikiText's model."""
        return "upcycled" in self.config or self.config.get("model_type") == _WIKITEXT

    @property
    def auto_class(self) -> str:
        """The Auto class that loads it, or its base model, as far as that is known."""
        model_type, class_name = self.config.get("model_type"), None
        if self.kind == "adapter":
            class_name = (self.config.get("auto_mapping") or {}).get("base_model_class")
            if RECORD_NAME in self.files:
                model_type = read_object(self.files[RECORD_NAME], PushError).get("model_type")
        from transformers.models.auto import modeling_auto  # it imports scikit-learn

        for name, mapping in _AUTO_CLASSES.items():
            known = getattr(modeling_auto, mapping)
            if model_type in known or class_name in known.values():
                return name
        return "AutoModelForImageTextToText" if "vision_config" in self.config else "AutoModelForCausalLM"


def open_folder(directory: str | Path) -> ModelFolder:
    """Look at a folder with a checkpoint, an adapter, or a run, and refuse what must not be shared.

    Args:
        directory: With a `config.json` or `adapter_config.json`; or a run's, with its model in `final/` or, the
            quickstart's, in `symphony/`.

    Raises:
        PushError: If there is no model, or a file of it is a pickle, code, or of a kind that no model needs.
        ConfigError: If the settings of the graphs cannot be read.
        GraphError: If the graphs cannot be read.
    """
    path, results = _find(Path(directory))
    is_adapter = (path / "adapter_config.json").exists()
    name = "adapter_config.json" if is_adapter else "config.json"
    config = read_object(path / name, PushError)
    stored = config.get("symphony")
    settings = None if stored is None else SymphonyConfig.from_stored(stored, where=f"{path / name}: symphony")
    if not is_adapter and settings is None and not _names_experts(config):
        raise PushError(f"push: `{path / 'config.json'}` names no experts: this is no mixture of experts")
    files, left_out = _sort(path)
    check_contents(files)
    return ModelFolder(
        path=path,
        kind="adapter" if is_adapter else "plain" if settings is None else "symphony",
        config=config,
        settings=settings,
        graphs=_graphs(path, is_adapter, settings),
        files=files,
        left_out=left_out,
        results=results,
    )


def _names_experts(config: Mapping[str, Any]) -> bool:
    return any(
        "expert" in name or (isinstance(value, Mapping) and _names_experts(value)) for name, value in config.items()
    )


def _find(directory: Path) -> tuple[Path, Path | None]:
    """Where the model is, and what its run has measured."""
    if not directory.is_dir():
        raise PushError(f"push: `{directory}` is no folder: give the one of a checkpoint, an adapter or a run")
    inside = [directory / name for name, measured in _RUNS.items() if (directory / measured).exists()]
    for path in (directory, *inside):
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            measured = [path / "results.json", path / "report.json"]
            if path.resolve().name in _RUNS:
                measured.append(path.resolve().parent / _RUNS[path.resolve().name])
            return path, next((file for file in measured if file.exists()), None)
    raise PushError(
        f"push: no model in `{directory}`: expected a config.json or an adapter_config.json there, or a run's `final/`"
    )


def _sort(path: Path) -> tuple[dict[str, Path], dict[str, str]]:
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for entry in sorted(path.iterdir()):
        reason = is_wanted(entry)
        if reason is not None:
            left_out[entry.name] = reason
        elif entry.is_dir():
            inside, outside = _sort(entry)
            files.update({f"{entry.name}/{name}": file for name, file in inside.items()})
            left_out.update({f"{entry.name}/{name}": why for name, why in outside.items()})
        else:
            files[entry.name] = entry
    return files, left_out


def _graphs(path: Path, is_adapter: bool, settings: SymphonyConfig | None) -> dict[str, Tensor]:
    if is_adapter:
        try:
            graphs = read_graphs(path / "adapter_model.safetensors")
        except GraphError:
            if settings is not None:
                raise
            return {}  # an adapter without the graph: of the experts or the attention alone
    elif settings is not None:
        graphs = read_graphs(path)
    else:
        return {}
    for name, graph in graphs.items():
        problems = adjacency_problems(graph, graph.shape[0] if graph.ndim else 0)
        if problems:
            raise GraphError(f"push: the graph of `{name}` in `{path}` is not usable: {'; '.join(problems)}")
    return {re.sub(r"^base_model\.model\.", "", name): graph for name, graph in graphs.items()}
