"""quantize_experts: load a MoE model with 4-bit experts, or quantize one in place."""

from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from symphony_hf.errors import ConfigError, PatchError
from symphony_hf.patching.expert_graph import is_adapted

from .loading import guard_saving, load_packed
from .packing import Packing, QuantType, check_bitsandbytes, check_rows, stacked_experts


def quantize_experts(
    model: PreTrainedModel | str | Path,
    *,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    model_class: Any = None,
    **loading: Any,
) -> PreTrainedModel:
    """Quantize stacked experts, most of a MoE's memory, to 4 bits; bitsandbytes by itself leaves them in 16 bits.

    A checkpoint is quantized as it is loaded, so that at most one layer's experts are in 16 bits at any time. A loaded
    model is quantized in place, one weight at a time. The packed experts are frozen and are unpacked whenever they are
    used, with every `experts_implementation`. Train adapters on them with gradient checkpointing: without it, the
    unpacked experts of all layers are kept for the backward pass.

    Args:
        model: Folder or Hub name of a checkpoint, or a loaded model, symphonized or not.
        quant_type: `nf4` or `fp4`.
        double_quant: Whether to quantize the scales too.
        model_class: Class that loads the checkpoint, such as an Auto class; by default that of its architecture.
        **loading: Arguments of `from_pretrained`. With `quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)`
            linear layers are quantized in the same load, except those of routers.

    Returns:
        The model. It cannot be saved with `save_pretrained`, but its adapters can.

    Raises:
        ConfigError: If bitsandbytes is missing, a setting is unknown, or the checkpoint is already quantized.
        UnsupportedModelError: If there are no stacked experts, or, on a CPU, rows of experts are not a multiple of 64.
        PatchError: If the model's experts are already packed, offloaded or partitioned.
        DataError: If weights of experts are missing from the checkpoint.
    """
    check_bitsandbytes()
    packing = Packing(quant_type, double_quant)
    if not isinstance(model, nn.Module):
        return load_packed(model, packing, model_class, loading)
    if loading or model_class is not None:
        names = ", ".join([*loading, *(["model_class"] if model_class is not None else [])])
        raise ConfigError(
            f"quantize_experts: {names}: arguments for loading a checkpoint, but a loaded model was given"
        )
    return _quantize_in_place(model, packing)


def _quantize_in_place(model: PreTrainedModel, packing: Packing) -> PreTrainedModel:
    names = _check_packable(model)
    with tqdm(names, desc="Packing experts", unit=" weights", disable=None) as bar:
        for name in bar:
            path, _, parameter_name = name.rpartition(".")
            module = model.get_submodule(path)
            packing.pack(module, parameter_name, getattr(module, parameter_name).detach())
    return guard_saving(model)


def _check_packable(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights to pack, not the weights, each of which is freed once it is packed."""
    if not isinstance(model, PreTrainedModel):
        raise PatchError(f"quantize_experts: expected a transformers model, got {type(model).__name__}: unwrap it")
    if is_adapted(model):
        raise PatchError("quantize_experts: the model has PEFT's adapters in it: quantize the base model first")
    experts = stacked_experts(model)
    for name, held in experts.items():
        if held.tensor.is_meta or hasattr(held.tensor, "ds_shape") or not held.tensor.is_floating_point():
            raise PatchError(
                f"quantize_experts: the weight of `{name}` is offloaded, partitioned or of type {held.tensor.dtype}: "
                "give the checkpoint's path instead of the model"
            )
    check_rows({name: held for name, held in experts.items() if held.tensor.device.type == "cpu"})
    return list(experts)
