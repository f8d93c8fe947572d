"""load_checkpoint: load an untrusted checkpoint, checking everything before it is used."""

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedModel

from symphony_hf.errors import UNREADABLE, CheckpointError, GraphError, SymphonyError
from symphony_hf.files import MAX_CONFIG_BYTES, read_object

from .graph_files import SUFFIX, checkpoint_files
from .model_class import named_class_of, nested_configs

_REFUSALS = (*UNREADABLE, SafetensorError, StrictDataclassError)
"""Errors that transformers and torch raise for a config or a file that they cannot build a model from."""

_CALLS = 100
"""Most calls of torch for each tensor while a model is built. No family of transformers needs 10, at four layers."""

_SMALL = 2**20
"""Number of elements of a tensor that may be made to try out a router, however small the files are: 4 MiB."""

_FACTORIES = (torch.eye, torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros)


def load_checkpoint(directory: str | Path, *, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Load an untrusted checkpoint: with graphs, with upcycled modules, or plain.

    The Auto classes check graphs too. This function also checks, before it allocates them, that the config needs no
    more weights and graphs than the files have, and refuses a checkpoint that lacks a weight, which transformers would
    initialize at random. It reads only JSON and safetensors and runs no code of the checkpoint. Quantized checkpoints
    are refused; load them with their Auto class.

    Args:
        directory: Folder with `config.json` and `model.safetensors`, or with shards and their index.
        dtype: Data type of the weights; `auto` for the checkpoint's own. Graphs are always float32.

    Returns:
        The model, of the class that the config names, in evaluation mode.

    Raises:
        ConfigError: If the settings of the graphs, or the record of upcycled modules, are invalid.
        GraphError: If a graph is missing or invalid, or the config has no settings for it.
        UnsupportedModelError: If the model has no router for a graph in the settings.
        UpcycleError: If an upcycled module is not an MLP, or the weights of its experts are missing.
        PatchError: If the model would bypass the graphs.
        CheckpointError: If anything else in the checkpoint is invalid or incomplete.
    """
    directory = Path(directory)
    _check_config(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a config that is about to be refused
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            model_class = named_class_of(config, f"`{directory}`", CheckpointError)
            tensors = _tensors(directory)
            _check_size(directory, model_class, config, tensors)
            model, info = model_class.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except SymphonyError:
        raise
    except _REFUSALS as error:
        raise CheckpointError(
            f"`{directory}`: no model can be built from it: {type(error).__name__}: {error}"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"`{directory}` lacks {len(missing)} of its model's weights ({missing[0]}, ...)")
    graphs = sorted(name for name in info["unexpected_keys"] if name.endswith(SUFFIX))
    if graphs:
        raise GraphError(
            f"`{directory}` has {len(graphs)} graphs that its config.json has no settings for ({graphs[0]}, ...): "
            "without them it would not route as trained"
        )
    return model


def _check_config(directory: Path) -> None:
    """Check the config before transformers reads it, since it decides what is read next."""
    file = directory / "config.json"
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"`{directory}` is an adapter: load it onto its base model with `symphony_hf.load_adapter`"
        )
    config = read_object(file, CheckpointError, max_bytes=MAX_CONFIG_BYTES)
    if config.get("auto_map"):
        raise CheckpointError(f"`{file}` asks for custom code (`auto_map`): code of a checkpoint is not run")
    if config.get("transformers_weights"):
        raise CheckpointError(f"`{file}` names other weights (`transformers_weights`), which are not checked")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"`{file}` is of a quantized checkpoint: load it with its Auto class")


def _tensors(directory: Path) -> dict[str, int]:
    """Return the number of elements of each tensor, from the headers of the files."""
    sizes: dict[str, int] = {}
    for file in checkpoint_files(directory):
        with safe_open(file, framework="pt") as tensors:
            sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return sizes


def _check_size(directory: Path, model_class: type[PreTrainedModel], config: Any, tensors: Mapping[str, int]) -> None:
    """Refuse a config that needs more weights or graphs than the files have, by building it on the meta device.

    The plain model is built first: patching tries each router on the CPU, at the size that the config claims.
    """
    plain = copy.deepcopy(config)
    for inner in nested_configs(plain):
        inner.symphony = None
    with torch.device("meta"), _MostCalls(directory, len(tensors)):
        model = model_class(plain)
    asked, there = sum(tensor.numel() for tensor in model.parameters()), sum(tensors.values())
    if asked > there:
        raise CheckpointError(f"`{directory}`: its config asks for {asked:,} weights, and the files have {there:,}")
    if all(getattr(inner, "symphony", None) is None for inner in nested_configs(config)):
        return
    with torch.device("meta"), _LargestTensor(directory, there):
        model = model_class(copy.deepcopy(config))
    graphs = [tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if name.endswith(SUFFIX)]
    asked = sum(graph.numel() for graph in graphs)
    there = sum(size for name, size in tensors.items() if name.endswith(SUFFIX))
    if asked > there:
        raise GraphError(
            f"`{directory}`: its config asks for graphs with {asked:,} numbers in all, and the files have {there:,}: a "
            "graph is missing or has another shape"
        )


class _MostCalls(TorchFunctionMode):
    """Raises CheckpointError if building a model takes far more calls of torch than its files have tensors.

    Even on the meta device, each module takes time, and a config may ask for any number of them.
    """

    def __init__(self, directory: Path, num_tensors: int) -> None:
        super().__init__()
        self.directory, self.num_tensors, self.num_calls = directory, num_tensors, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        if self.num_calls > _CALLS * self.num_tensors:
            raise CheckpointError(
                f"`{self.directory}`: its config asks for far more modules than the {self.num_tensors} tensors of the "
                "files can fill"
            )
        return func(*args, **(kwargs or {}))


class _LargestTensor(TorchFunctionMode):
    """Raises CheckpointError before a tensor is made that is larger than all tensors of the files together.

    A router is tried out with a matrix of one number for each pair of experts, as large as its graph.
    """

    def __init__(self, directory: Path, num_elements: int) -> None:
        super().__init__()
        self.directory, self.num_elements = directory, num_elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in _FACTORIES and device is not None and torch.device(device).type != "meta":
            settings = {name: value for name, value in kwargs.items() if name not in ("device", "generator", "out")}
            size = func(*args, **settings, device="meta").numel()
            if size > max(self.num_elements, _SMALL):
                raise CheckpointError(
                    f"`{self.directory}`: its config asks for a graph or a tensor of {size:,} numbers, and all tensors "
                    f"of the files have {self.num_elements:,}"
                )
        return func(*args, **kwargs)
