"""Fold graphs into the routers' own weights."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from symphony_hf.checkpoints.saving import check_shard_size, plain_config
from symphony_hf.data.tokenizer import has_vocabulary
from symphony_hf.errors import UNREADABLE, FoldError, PatchError, SymphonyWarning
from symphony_hf.files import ADAPTER_CONFIG, replacing_folder
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.results import check_folder_place

from .attachment import settle
from .engines import engine_warnings
from .expert_graph import active_graph, is_adapted
from .symphonize import Model, check_whole, symphony_routers, unsymphonize

logger = logging.get_logger(__name__)


def folded_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Compute the router weights (and biases) with the graph folded in, by parameter name.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly.
    """
    if is_adapted(model):
        raise FoldError("fold: the model has PEFT's adapters in it: `merge_and_unload()` first")
    routers = list(symphony_routers(model))
    check_whole(model, "fold")
    settle(model)
    folded: dict[str, Tensor] = {}
    for name, router in routers:
        contract = router.contract
        linear: Any = linear_of(router, contract.linear)  # type: ignore[arg-type]
        graph = active_graph(router.symphony)
        if graph.config.smoothing != "logits":
            raise FoldError(
                f"fold: `{name}` smooths scores, after softmax, which no plain router computes: only smoothing="
                "`logits` folds"
            )
        weight: Tensor = linear.weight
        sharded = hasattr(weight, "full_tensor")  # FSDP2's, between forwards
        if not weight.is_floating_point() or weight.is_meta or weight.numel() == 0 or sharded:
            raise FoldError(f"fold: the weight of `{name}` is quantized, offloaded or partitioned: load it whole first")
        path = f"{name}.{contract.linear}" if contract.linear else name
        for parameter_name in contract.parameters:
            with torch.no_grad():
                folded[f"{path}.{parameter_name}"] = router.apply_graph(getattr(linear, parameter_name))
    return folded


def fold(model: Model) -> Model:
    """Fold each graph into its router's weight, in place: a plain model with the same logits.

    In 16 bits, and under autocast to them, they are the same to the bit. In float32 a router smooths its logits instead
    of multiplying by A W, and they differ by the rounding of sums, 1e-5 of the largest at most.

    Args:
        model: The model that was symphonized, not wrapped.

    Returns:
        The same model.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly; the model is left as it was.
    """
    parameters = folded_parameters(model)
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)
    return unsymphonize(model)


def export_folded(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    tokenizer: Any = None,
) -> Path:
    """Write a plain checkpoint of the base family, with each graph folded into its router's weight.

    Tensor names and config are stock, and the logits are those of `fold`. Exception: modules made by `upcycle_modules`
    still need this package. The model itself is left as it is. A warning names settings that vLLM or llama.cpp are
    known to ignore and that have another value here.

    Args:
        model: A Symphony model, not wrapped.
        directory: Output folder. A checkpoint there is replaced once the new one is written; other files are kept,
            and so is a tokenizer if none is written.
        max_shard_size: Maximum size of one weights file, in bytes or as in `"5GB"`.
        tokenizer: Tokenizer or processor to write. If None, the one of the checkpoint that the model was loaded from,
            locally or in the Hub's cache; nothing is downloaded. False: none.

    Returns:
        The directory.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly, or an adapter is in the folder.
        ConfigError: If the folder cannot be written or replaced, or the size is invalid.
        CheckpointError: If another process is writing the same folder.
    """
    if not isinstance(model, PreTrainedModel):
        raise PatchError(f"export_folded: expected a transformers model, got {type(model).__name__}: unwrap it first")
    directory = Path(directory)
    check_shard_size(max_shard_size, "export_folded")
    check_folder_place(directory, "export_folded")
    if (directory / ADAPTER_CONFIG).exists():
        raise FoldError(
            f"export_folded: `{directory}` holds an adapter, which would be loaded instead: give another folder"
        )
    folded = folded_parameters(model)
    graphs = tuple(f"{name}.symphony." for name, _ in symphony_routers(model))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(graphs)}
    state.update(folded)
    is_writer = model.should_save_on_this_rank(is_main_process=True)  # the other ranks write nothing into theirs
    with replacing_folder(directory.resolve()) if is_writer else tempfile.TemporaryDirectory() as unfinished:
        type(model).save_pretrained(model, unfinished, state_dict=state, max_shard_size=max_shard_size)
        if is_writer:
            plain_config(model).save_pretrained(unfinished)
            _save_tokenizer(model, Path(unfinished), tokenizer)
    for warning in engine_warnings(model.config) if is_writer else ():
        warnings.warn(f"export_folded: {warning}", SymphonyWarning, stacklevel=2)
    model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))
    return directory


def _save_tokenizer(model: PreTrainedModel, folder: Path, tokenizer: Any) -> None:
    if tokenizer is None:
        tokenizer = _find_tokenizer(model)
    if tokenizer is not None and tokenizer is not False:
        tokenizer.save_pretrained(folder)


def _find_tokenizer(model: PreTrainedModel) -> Any:
    """Load the tokenizer of the checkpoint that a model was loaded from, without a download.

    For a model with images it is the whole processor or nothing: its tokenizer alone would replace a processor.
    """
    has_images = getattr(model.config, "vision_config", None) is not None
    kind: Any = AutoProcessor if has_images else AutoTokenizer
    reason = f"none beside `{model.name_or_path}`" if model.name_or_path else "the model was built from a config"
    try:
        if model.name_or_path:
            found = kind.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
            if has_vocabulary(found):
                return found
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
    what = "processor" if has_images else "tokenizer"
    logger.warning(f"export_folded: no {what} is written ({reason}): copy its files there, or give `tokenizer=`")
    return None
