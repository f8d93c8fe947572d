"""quantize_experts: a MoE model with its experts in 4 bits, loaded so or made so in place."""

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
    """Quantize stacked experts to 4 bits with bitsandbytes, which alone leaves them in 16: most of a MoE's bytes.

    A checkpoint is quantized while it is loaded, a layer's experts at a time: at no time are more than one layer's in
    16 bits. A model is quantized in place, likewise a layer at a time. The packed experts are frozen, and are unpacked
    whenever they are used, under every `experts_implementation`. Train adapters on them with gradient checkpointing:
    without it, the unpacked experts of all layers are kept for the backward pass.

    Args:
        model: A checkpoint's folder or name on the Hub; or a loaded model, symphonized or not.
        quant_type: nf4 or fp4.
        double_quant: Whether the scales are quantized, too.
        model_class: What loads the checkpoint, such as an Auto class; the class of its architecture when None.
        **loading: Settings of `from_pretrained`. With `quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)`
            the linear maps are quantized in the same load, but for those of routers.

    Returns:
        The model. `save_pretrained` refuses it; adapters can be saved.

    Raises:
        ConfigError: If bitsandbytes is missing, a setting is unknown, or the checkpoint is quantized already.
        UnsupportedModelError: If there are no stacked experts, or, on a CPU, such of sizes that are no multiple of 64.
        PatchError: If the model's experts are packed already, or are not to be had as numbers.
        DataError: If the checkpoint lacks experts.
    """
    check_bitsandbytes()
    packing = Packing(quant_type, double_quant)
    if not isinstance(model, nn.Module):
        return load_packed(model, packing, model_class, loading)
    if loading or model_class is not None:
        names = ", ".join([*loading, *(["model_class"] if model_class is not None else [])])
        raise ConfigError(f"quantize_experts: {names}: settings of loading a checkpoint, but a loaded model was given")
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
    """The names of the weights to pack; not the weights, of which each is to be freed as soon as it is packed."""
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
