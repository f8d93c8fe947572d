"""Saving and loading: graphs in the safetensors, settings in config.json, and a folded form that needs none of us.

Loading works through transformers' own Auto and concrete classes: two wraps, of `PreTrainedModel.post_init` and
`PreTrainedModel._initialize_weights`, act when, and only when, a config carries a `symphony` entry. The first makes
the routers Symphony routers before the weights arrive; the second checks what arrived.
"""

import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attachment import attach, check_balance_scope, detach, tracker_of
from .compat import supported_range, transformers_is_supported
from .config import SymphonyConfig
from .errors import GraphError, PatchError, SymphonyError, UnsupportedModelError
from .families import routers_of
from .folding import folded_parameters
from .graph import ExpertGraph, active_graph
from .modules import UpcycledMoE, check_loaded, restore_modules
from .patching import check_nothing_bypasses, is_symphonized, patch_router, symphony_routers, unpatch_router
from .router import SymphonyRouter
from .routing import adjacency_problems
from .saving import mark_architectures, own_losses, unmark_architectures


def install_loading_wraps() -> None:
    """Wrap the two methods, once.

    Raises:
        SymphonyError: If the installed transformers is not one that we know.
    """
    if not transformers_is_supported():
        raise SymphonyError(f"{supported_range()}: install one of these")
    if not hasattr(PreTrainedModel.post_init, "_symphony_wrap"):
        PreTrainedModel.post_init = _wrap_post_init(PreTrainedModel.post_init)  # type: ignore[method-assign]
        PreTrainedModel._initialize_weights = _wrap_initialize_weights(PreTrainedModel._initialize_weights)  # type: ignore[method-assign]


def _wrap_post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        if getattr(self.config, "upcycled", None) is not None:
            restore_modules(self)
            unmark_architectures(self.config)
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
    for router in found:
        if not is_symphonized(router.module):
            patch_router(router, settings)
    if found:
        attach(model, found, model.config.symphony)
    unmark_architectures(model.config)


def _refuse(model: PreTrainedModel, args: Any) -> None:
    raise UnsupportedModelError(model._symphony_refusal)


def _check_or_reset(model: PreTrainedModel, graph: ExpertGraph) -> None:
    """Called for every graph when a model is initialized: freshly, or after a checkpoint was loaded into it."""
    tensors = (graph.adjacency, graph.updates)
    if not (graph.awaits_checkpoint and _is_loaded(model)):  # freshly made, be it on the meta device
        if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            graph.reset()
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
    """Whether weights of a checkpoint are in it."""
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


def export_folded(model: PreTrainedModel, directory: str | os.PathLike[str]) -> Path:
    """Write a plain checkpoint of the base family, with each graph folded into its router's weight.

    It has the stock tensor names and config and nothing of ours in it; any server runs it, to the same logits. But for
    a model with modules of `upcycle_modules`: without graphs, these still need this package. The model itself is left
    as it is.

    Args:
        model: A Symphony model, not wrapped.
        directory: Where to. Weights and config that are there are replaced when everything has been written.

    Returns:
        The directory.

    Raises:
        PatchError: If the model is not symphonized, or is a part of one that is.
        FoldError: If a graph cannot be folded exactly.
    """
    if not isinstance(model, PreTrainedModel):
        raise PatchError(f"export_folded: expected a transformers model, got {type(model).__name__}: unwrap it first")
    folded = folded_parameters(model)
    graphs = tuple(f"{name}.symphony." for name, _ in symphony_routers(model))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(graphs)}
    state.update(folded)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".folding-", dir=directory))
    settings = model.config.symphony
    try:
        del model.config.symphony
        with own_losses(tracker_of(model).silenced):
            type(model).save_pretrained(model, unfinished, state_dict=state)
        if getattr(model.config, "upcycled", None) is not None and (unfinished / "config.json").exists():
            mark_architectures(unfinished / "config.json")  # its experts are of no family that others know
        if model.should_save_on_this_rank(is_main_process=True):  # the other ranks have nothing in theirs
            _replace_checkpoint(directory, unfinished)
    finally:
        model.config.symphony = settings
        shutil.rmtree(unfinished)
    model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))
    return directory


def _replace_checkpoint(directory: Path, unfinished: Path) -> None:
    written = {file.name for file in unfinished.iterdir()}
    for name in written:
        os.replace(unfinished / name, directory / name)
    for stale in {file.name for file in directory.glob("model*.safetensors*")} - written:
        (directory / stale).unlink()  # other shards of what was here before would be read instead
