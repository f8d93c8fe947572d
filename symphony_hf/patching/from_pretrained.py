"""Saving and loading: graphs in the safetensors, settings in config.json, and a folded form that needs none of us.

Loading works through transformers' own Auto and concrete classes. Five methods of theirs are wrapped, and act only on
Symphony models and checkpoints: `PreTrainedModel.post_init` turns the routers into Symphony routers before the weights
arrive, `_initialize_weights` checks what arrived, `_adjust_missing_and_unexpected_keys` reports graphs that were left
out, `PreTrainedConfig.to_json_file` marks the config that is written, and `_dict_from_json_file` removes the marks.
"""

import functools
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.checkpoints.marks import wrap_dict_from_json_file, wrap_to_json_file
from symphony_hf.compat import supported_range, transformers_is_supported
from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import GraphError, SymphonyError, SymphonyWarning, UnsupportedModelError
from symphony_hf.models.upcycled_moe import UpcycledMoE
from symphony_hf.patching.families.named_gates import routers_of
from symphony_hf.routing.graph import adjacency_problems

from .attachment import attach, check_balance_scope, detach
from .expert_graph import ExpertGraph, active_graph
from .router import SymphonyRouter
from .router_gradient_checks import check_router_gradient
from .symphonize import check_nothing_bypasses, is_symphonized, patch_router, symphony_routers, unpatch_router
from .upcycle_modules import check_loaded, restore_modules


def install_loading_wraps() -> None:
    """Wrap the methods of transformers, once.

    Raises:
        SymphonyError: If the installed transformers is not one that we know.
    """
    if not transformers_is_supported():
        raise SymphonyError(f"{supported_range()}: install one of these")
    if not hasattr(PreTrainedModel.post_init, "_symphony_wrap"):
        PreTrainedModel.post_init = _wrap_post_init(PreTrainedModel.post_init)  # type: ignore[method-assign]
        PreTrainedModel._initialize_weights = _wrap_initialize_weights(PreTrainedModel._initialize_weights)  # type: ignore[method-assign]
        PreTrainedModel._adjust_missing_and_unexpected_keys = _wrap_adjust_keys(  # type: ignore[method-assign]
            PreTrainedModel._adjust_missing_and_unexpected_keys
        )
        PreTrainedConfig.to_json_file = wrap_to_json_file(PreTrainedConfig.to_json_file)  # type: ignore[method-assign]
        reader = wrap_dict_from_json_file(PreTrainedConfig._dict_from_json_file.__func__)
        PreTrainedConfig._dict_from_json_file = classmethod(reader)


def _wrap_post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        if getattr(self.config, "upcycled", None) is not None:
            restore_modules(self)
        if getattr(self.config, "symphony", None) is not None:
            _restore_routers(self)

    post_init._symphony_wrap = True  # type: ignore[attr-defined]
    return post_init


def _wrap_initialize_weights(original: Any) -> Any:
    @functools.wraps(original)
    def _initialize_weights(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        if isinstance(module, ExpertGraph):
            _check_or_reset(self, module)
            return
        if isinstance(module, UpcycledMoE) and module.awaits_checkpoint:
            check_loaded(self)
        if module is self and "_symphony_refusal" in self.__dict__ and _is_loaded(self):
            raise UnsupportedModelError(self._symphony_refusal)
        original(self, module, is_custom_code)

    return _initialize_weights


def _wrap_adjust_keys(original: Any) -> Any:
    @functools.wraps(original)
    def _adjust_missing_and_unexpected_keys(self: PreTrainedModel, loading_info: Any) -> None:
        graphs = sorted(key for key in loading_info.unexpected_keys if key.endswith(".symphony.adjacency"))
        if graphs:
            warnings.warn(
                f"{type(self).__name__}: the checkpoint has {len(graphs)} expert graphs ({graphs[0]}, ...) that its "
                "config.json has no `symphony` settings for, so they are left out: write the Symphony model's config "
                "there with `model.config.save_pretrained`, or call `symphonize(model, graph=PATH)` with its path",
                SymphonyWarning,
                stacklevel=2,
            )
        original(self, loading_info)

    return _adjust_missing_and_unexpected_keys


def _restore_routers(model: PreTrainedModel) -> None:
    """Make a model that was just built from a Symphony config a Symphony model, before its weights are loaded.

    A model nested in it has the same config, and was restored when it was built, as well as could be seen from inside:
    a stack of an encoder-decoder may have no router, or not all layers. The model around it decides, so what it refuses
    is raised when a checkpoint is loaded into the outermost one, or when that is first run.
    """
    settings = SymphonyConfig.from_stored(model.config.symphony, where="config.json: symphony")
    check_nothing_bypasses(model)
    for module in model.modules():
        detach(module)
        if module.__dict__.pop("_symphony_refusal", None) is not None:
            module.__dict__.pop("_symphony_refuser").remove()
    found = []
    try:
        found = routers_of(model, settings, inside=True)
    except UnsupportedModelError as error:
        model.__dict__["_symphony_refusal"] = str(error)
        model.__dict__["_symphony_refuser"] = model.register_forward_pre_hook(_refuse)
    wanted = {id(router.module) for router in found}
    for module in list(model.modules()):
        if isinstance(module, SymphonyRouter) and id(module) not in wanted:
            unpatch_router(module)
    check_balance_scope(model, found, settings)
    check_router_gradient(found, settings)
    for router in found:
        if not is_symphonized(router.module):
            patch_router(router, settings)
    if found:
        attach(model, found, settings.to_dict())


def _refuse(model: PreTrainedModel, args: Any) -> None:
    raise UnsupportedModelError(model._symphony_refusal)


def _check_or_reset(model: PreTrainedModel, graph: ExpertGraph) -> None:
    """Reset a fresh graph, or check one that a checkpoint was loaded into."""
    tensors = (graph.adjacency, graph.updates)
    if not (graph.awaits_checkpoint and _is_loaded(model)):  # freshly made, be it on the meta device
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            graph.reset()
            if not graph.adjacency.is_meta and any(parameter.is_meta for parameter in model.parameters()):
                graph.mark_not_loaded()  # accelerate's `init_empty_weights`
        return
    problems = _loading_problems(model)
    if problems:
        raise GraphError(
            f"{type(model).__name__}: the checkpoint's expert graphs are not usable: {' | '.join(problems)}. Its "
            "config.json says that it is a Symphony model; delete `symphony` there to load it without graphs"
        )
    for _, router in symphony_routers(model):
        active_graph(router.symphony).awaits_checkpoint = False
        if router.stack is not None:
            router.stack.tracker.place_scale()


def _is_loaded(model: PreTrainedModel) -> bool:
    """Whether a checkpoint's weights were loaded into a model."""
    return any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def _loading_problems(model: PreTrainedModel) -> list[str]:
    problems = []
    for name, module in model.named_modules():
        if not isinstance(module, ExpertGraph) or not module.awaits_checkpoint:
            continue
        for tensor_name in ("adjacency", "updates"):
            tensor = getattr(module, tensor_name)
            if not getattr(tensor, "_is_hf_initialized", False):
                problems.append(f"{name}.{tensor_name}: missing, or of another shape")
            elif tensor_name == "adjacency" and not tensor.is_meta:
                problems += [f"{name}.adjacency: {found}" for found in adjacency_problems(tensor, module.num_experts)]
            elif tensor_name == "updates" and not tensor.is_meta and int(tensor) < 0:
                problems.append(f"{name}.updates: {int(tensor)}, where a number of updates was expected")
    return problems
