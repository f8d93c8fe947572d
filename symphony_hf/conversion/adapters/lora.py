"""lora_config: a stock LoraConfig for Symphony models of any family."""

import dataclasses
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)

from symphony_hf.conversion.inspection.parts import Anatomy
from symphony_hf.conversion.inspection.tensors import bare_name, base_of, held_tensors
from symphony_hf.errors import ConfigError, nearest
from symphony_hf.patching.correction_bias import adapter_remedy
from symphony_hf.patching.symphonize import symphony_routers

from .record import AdapterRecord, RouterMode, check_not_repeated, check_same_mode, keep_record
from .targets import (
    ExpertTargets,
    attention_targets,
    expert_targets,
    in_chosen_layers,
    is_end_of,
    shortest_ends,
    taken_for_experts,
)

_OURS = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
_LISTS = ("target_modules", "target_parameters", "modules_to_save")
_NOT_ON_STACKED_EXPERTS = ("use_dora", "lora_bias", "fan_in_fan_out", "velora_config", "kasa_config")
"""Settings of LoraConfig that PEFT does not support for `target_parameters`."""

_CHOICES_OF_LAYERS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings of LoraConfig that PEFT applies to `target_modules` alone."""

_HEADS = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
"""Task types of the models with a head of their own, which is new where the rest was trained on text."""


def lora_config(
    model: nn.Module,
    *,
    router: RouterMode = "graph",
    experts: bool = False,
    attention: bool = True,
    r: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> Any:
    """Return a LoraConfig with the graphs in the adapter, for `peft.get_peft_model` or TRL.

    Each adapter has its own graphs, in float32. They change during training, merging keeps them, and
    `disable_adapter()` restores those of the base model. The head of a model for classification or question answering
    is in the adapter as a whole. However the adapter is saved, a `symphony_config.json` is
    written beside it, which tells `load_adapter` what the adapter needs.

    Args:
        model: Symphonized model of any family, on any device, quantized or not, with or without adapters.
        router: `graph`: router weights are frozen. `train`: they are trained and saved in the adapter.
        experts: Whether to apply LoRA to the experts.
        attention: Whether to apply LoRA to the attention of the decoder stacks that have routers.
        r: Rank.
        alpha: LoRA's alpha; by default twice the rank.
        dropout: Dropout on LoRA's input. Must be 0 for experts that are stacked in one parameter.
        **more: Other settings of LoraConfig. `target_modules`, `target_parameters` and `modules_to_save` are lists of
            names that are added to those found. `layers_to_transform`, `layers_pattern` and `exclude_modules` also
            choose among stacked experts, which PEFT alone does not apply them to.

    Returns:
        A `peft.LoraConfig`.

    Raises:
        PatchError: If the model is not symphonized.
        ConfigError: If a setting is unknown, matches nothing, or is not supported by PEFT; or if `balance` is `bias`,
            and the adapter would not hold the biases.
        UnsupportedModelError: If LoRA cannot be applied to the attention or the experts.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    record = AdapterRecord.of(model, router)  # refuses a model without graphs
    _check_settings(model, router, more)
    anatomy = Anatomy(model)
    modules, parameters = _found_targets(model, anatomy, attention, experts, dropout, more)
    wanted = {name: list(more.pop(name, None) or ()) for name in _LISTS}
    _check_wanted(model, anatomy, wanted)
    modules, parameters = modules + wanted["target_modules"], parameters + wanted["target_parameters"]
    parameters = _in_chosen_layers(model, parameters, more)
    whole = _head(model, anatomy) + wanted["modules_to_save"]
    saved = _saved_modules(anatomy, router) + whole
    _check_biases(model, record, saved)
    learns = router == "train" or record.settings.graph == "learned" or whole
    _check_trains(modules or parameters or learns)
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        # PEFT requires a target; this placeholder of its own matches nothing.
        target_modules=modules or ([] if parameters else DUMMY_TARGET_MODULES),
        target_parameters=parameters or None,
        modules_to_save=saved,
        **{"task_type": _task_type(base_of(model)), **more},
    )
    return keep_record(config, record)


def plain_lora_config(
    model: nn.Module, *, router: RouterMode, experts: bool, attention: bool, r: int, alpha: int, dropout: float
) -> Any:
    """Return the LoraConfig that `lora_config` would, for a model without graphs: the baseline of an adapter with them.

    With `router="train"`, the adapter has the routers whole; the head of a model for classification or question
    answering it always has.

    Raises:
        ConfigError: If nothing would be trained, or a setting is not supported by PEFT.
        UnsupportedModelError: If the model has no router, or LoRA cannot be applied to the attention or the experts.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    anatomy = Anatomy(model)
    modules, parameters = _found_targets(model, anatomy, attention, experts, dropout, {})
    saved = (_saved_modules(anatomy, router) if router == "train" else []) + _head(model, anatomy)
    _check_trains(modules or parameters or saved)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules or ([] if parameters else DUMMY_TARGET_MODULES),
        target_parameters=parameters or None,
        modules_to_save=saved or None,
        task_type=_task_type(base_of(model)),
    )


def _found_targets(
    model: nn.Module, anatomy: Anatomy, attention: bool, experts: bool, dropout: float, more: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Return `target_modules` and `target_parameters`."""
    modules = attention_targets(model, anatomy) if attention else []
    if not experts:
        return modules, []
    found = expert_targets(model, anatomy)
    _check_experts(found, dropout, more)
    return modules + found.modules, found.parameters


def _check_trains(trained: Any) -> None:
    if not trained:
        raise ConfigError("lora_config: nothing would be trained: turn on attention or experts, or give router='train'")


def _check_settings(model: nn.Module, router: RouterMode, more: dict[str, Any]) -> None:
    from peft import LoraConfig

    if router not in ("graph", "train"):
        raise ConfigError(f"lora_config: `router` is {router!r}; {nearest(str(router), ('graph', 'train'))}")
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - _OURS.keys() | set(_OURS.values())
    for name in more:
        if name in _OURS:
            raise ConfigError(f"lora_config: `{name}` is called `{_OURS[name]}` here")
        if name not in known:
            raise ConfigError(f"lora_config: LoraConfig has no `{name}`; {nearest(name, known)}")
    for name in _LISTS:
        if isinstance(more.get(name), str):
            raise ConfigError(
                f"lora_config: `{name}` must be a list of names, got {more[name]!r}: a pattern, such as 'all-linear', "
                "may match routers, whose LoRA would go past the graph"
            )
    check_not_repeated(more.get("layer_replication"), "lora_config")
    check_same_mode(model, router, "lora_config")


def _in_chosen_layers(model: nn.Module, parameters: list[str], more: dict[str, Any]) -> list[str]:
    """Return the entries of `target_parameters` for the layers that the settings choose."""
    chosen = {name: more[name] for name in _CHOICES_OF_LAYERS if more.get(name) is not None}
    if not parameters or not chosen:
        return parameters
    left = in_chosen_layers(model, parameters, chosen)
    if not left:
        settings = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        raise ConfigError(
            f"lora_config: {settings} leave none of the stacked weights {', '.join(parameters)} to LoRA: choose other "
            "layers, or leave out experts=True and `target_parameters`"
        )
    return left


def _check_experts(found: ExpertTargets, dropout: float, more: dict[str, Any]) -> None:
    if not found.parameters:
        return
    if found.is_packed:
        raise ConfigError(
            "lora_config: the experts are packed in 4 bits, and PEFT does not train LoRA on weights that bitsandbytes "
            f"has parametrized: no release up to 0.21.2 does (installed: {importlib.metadata.version('peft')}). Give "
            "experts=False, or load the experts in 16 bits"
        )
    if dropout:
        raise ConfigError(
            f"lora_config: dropout is {dropout}, and PEFT's LoRA on stacked experts is added to their weights, where "
            "no input can be dropped: give dropout=0"
        )
    for name in _NOT_ON_STACKED_EXPERTS:
        if more.get(name):
            raise ConfigError(f"lora_config: PEFT cannot do `{name}` on stacked experts: leave out one of the two")
    if isinstance(more.get("init_lora_weights"), str) and more["init_lora_weights"] != "gaussian":
        raise ConfigError(
            f"lora_config: PEFT cannot start LoRA on stacked experts by {more['init_lora_weights']!r}: leave "
            "`init_lora_weights` as it is, or give experts=False"
        )


def _check_wanted(model: nn.Module, anatomy: Anatomy, wanted: dict[str, list[str]]) -> None:
    """Refuse names that PEFT would ignore silently or mistake for others."""
    parameters = {bare_name(held.name) for held in held_tensors(model) if ".lora_" not in held.name}
    known: dict[str, Iterable[str]] = dict.fromkeys(_LISTS, anatomy.modules) | {"target_parameters": parameters}
    for setting, ends in wanted.items():
        for end in ends:
            matched = [name for name in known[setting] if is_end_of(name, end)]
            if not matched:
                leaves = {name.rpartition(".")[2] for name in known[setting]} - {""}
                raise ConfigError(f"lora_config: `{setting}`: nothing is called {end!r}; {nearest(end, leaves)}")
            routers = [name for name in matched if any(f"{name}.".startswith(f"{r}.") for r in anatomy.routers)]
            if routers:
                raise ConfigError(
                    f"lora_config: `{setting}`: {end!r} matches the router `{routers[0]}`: give router='train' instead"
                )
    taken = taken_for_experts(model, wanted["target_modules"])
    if taken:
        raise ConfigError(
            f"lora_config: `target_modules`: PEFT takes {', '.join(map(repr, taken))} for weights of the routed "
            "experts, as older checkpoints name them, and would put LoRA on these: leave it out"
        )


def _saved_modules(anatomy: Anatomy, router: RouterMode) -> list[str]:
    """Return name suffixes of the modules that the adapter holds whole. PEFT matches them regardless of dots."""
    wanted = [name if router == "train" else f"{name}.symphony" for name in anatomy.routers]
    return shortest_ends(wanted, anatomy.modules, matches=str.endswith)


def _check_biases(model: nn.Module, record: AdapterRecord, saved: list[str]) -> None:
    """Refuse balance `bias` where no saved module holds the correction bias, which would move in the base model."""
    if record.settings.balance != "bias":
        return
    for name, router in symphony_routers(model):
        contract = router.contract
        pieces = (name.rpartition(".")[0] if contract.bias_in_block else name).split(".")
        around = [".".join(pieces[:count]) for count in range(1, len(pieces) + 1)]
        if not any(module.endswith(end) for module in around for end in saved):
            raise ConfigError(
                f"lora_config: `{contract.correction_bias}` of `{around[-1]}` is not in the adapter, which would be "
                f"saved without what balance='bias' moves: give {adapter_remedy(contract, around[-1])}, or symphonize "
                "with balance='loss'"
            )


def _head(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Return name suffixes of the head of a model for classification or question answering.

    PEFT adds such heads to some adapters, by the names that it knows; adapters of transformers' own integration lack
    them.
    """
    base: Any = base_of(model)
    if _task_type(base) not in _HEADS:
        return []
    others = {name: child for name, child in base.named_children() if child is not base.base_model}
    heads = [name for name, child in others.items() if next(child.parameters(), None) is not None]
    return shortest_ends(heads, anatomy.modules, matches=str.endswith)


def _task_type(model: nn.Module) -> str | None:
    """Return the task type by which PEFT's wrapper knows the inputs and outputs of a model, and still generates."""
    if not isinstance(model, PreTrainedModel):
        return None
    for task, mapping in _HEADS.items():
        if isinstance(model, mapping.get(type(model.config), ())):
            return task
    if not model.can_generate():
        return None
    if type(model.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None  # PEFT has no such task; without one, it records the class for its AutoPeftModel
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
