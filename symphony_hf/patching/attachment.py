"""Attach a tracker to a patched model: hooks on its decoder stacks, its loss function and `save_pretrained`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.saving import give_savers, mark_savers, take_savers
from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import ConfigError, PatchError
from symphony_hf.patching.families.discovery import FoundRouter

from .counting import CoselectionCounter
from .graph_updates import Tracker
from .native_losses import switch_off_native_losses
from .padding import mask_name, watch_masks
from .recorded_loss import loss_shifts_labels, record_loss_function, restore_loss_function, share_of_step
from .router_gradient import attach_gradients


def check_balance_scope(model: nn.Module, found: list[FoundRouter], settings: SymphonyConfig) -> None:
    """Refuse a balance loss that waits for all ranks where one may skip a router.

    The model itself and its language model run in every forward. An image or audio encoder does not.

    Raises:
        ConfigError: If `balance_scope` is `global` or `step`, and a router is in such an encoder.
    """
    waits = settings.balance_scope in ("global", "step") and settings.balance_loss_weight > 0
    if not waits or not isinstance(model, PreTrainedModel):
        return
    always_run = (type(model.config), type(model.config.get_text_config()))
    for router in found:
        if type(router.owner.config) not in always_run:
            raise ConfigError(
                f"symphony: `balance_scope` is '{settings.balance_scope}', but the router `{router.name}` is in a "
                f"{type(router.owner).__name__}, which a batch without its inputs (of text alone, say) leaves out, and "
                "the other ranks would wait for its load: use balance_scope='local', or leave this router out by "
                "`layers` or `routers`"
            )


def attach(model: PreTrainedModel, found: list[FoundRouter], settings: dict[str, Any]) -> None:
    """Attach hooks and the recorded loss to a model with patched routers.

    While a checkpoint loads, a nested model is patched first; the model around it then takes over.
    """
    for module in model.modules():
        detach(module)
    tracker = Tracker()
    # Grouped in the order of the model's modules: every rank must reduce its counts in the same one.
    by_stack: dict[tuple[int, int], list[FoundRouter]] = {}
    for router in found:
        by_stack.setdefault((id(router.owner), router.contract.num_experts), []).append(router)
    for key, routers in enumerate(by_stack.values()):
        owner, modules = routers[0].owner, [router.module for router in routers]
        tracker.counters.append(CoselectionCounter(key, owner, modules, mask_name(model, owner), tracker))
    tracker.place_scale()
    model._symphony_tracker = tracker  # type: ignore[assignment]
    tracker.handles.append(model.register_forward_pre_hook(_begin_forward, with_kwargs=True))
    owners = [counter.owner for counter in tracker.counters]
    tracker.handles.extend(watch_masks(model, owners, tracker.state.masks))
    tracker.handles.append(model.register_forward_hook(_end_forward, with_kwargs=True))
    tracker.handles.extend(attach_gradients(model, found))
    if isinstance(model, PreTrainedModel):
        _attach_to_pretrained(model, found, settings, tracker)


def _attach_to_pretrained(
    model: PreTrainedModel, found: list[FoundRouter], settings: dict[str, Any], tracker: Tracker
) -> None:
    tracker.native_losses = switch_off_native_losses(model, tracker.config, tracker.state)
    record_loss_function(model, tracker)
    patched = {id(router.module) for router in found}
    for module in reversed(list(model.modules())):  # a config that two models share names the outer one
        if isinstance(module, PreTrainedModel) and any(id(part) in patched for part in module.modules()):
            # A vision-language checkpoint may be loaded as its language model alone, by that model's own config.
            module.config.symphony = {**settings, "model_class": type(module).__name__}
            give_savers(module, tracker.settle_alone)
    # What a cast or a loader keeps in float32: buffers stay by themselves, a learned graph is a parameter.
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "symphony"}


def detach(module: nn.Module) -> None:
    """Undo `attach` on the module that it was called on. Other modules are left as they are."""
    tracker: Tracker | None = module.__dict__.pop("_symphony_tracker", None)
    if tracker is None:
        return
    for handle in [*tracker.handles, *(handle for counter in tracker.counters for handle in counter.handles)]:
        handle.remove()
    for losses in tracker.native_losses:
        losses.remove()
    tracker.remove_log_probs_hook()
    for part in module.modules():
        take_savers(part)
    mark_savers(module)
    restore_loss_function(module)
    tracker.counters.clear()
    if isinstance(module, PreTrainedModel):
        strict = module.__dict__["_keep_in_fp32_modules_strict"]
        module.__dict__["_keep_in_fp32_modules_strict"] = strict - {"symphony"}


def _begin_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note that a forward begins: a pre-hook, and a function, since a copy of the model has its own tracker."""
    tracker: Any = model._symphony_tracker
    if model.training and torch.is_grad_enabled():
        tracker.state.recorded_in_forward = False
        tracker.settle()
        if isinstance(model, PreTrainedModel):
            record_loss_function(model, tracker)
    else:
        tracker.settle_alone()


def settle(model: nn.Module) -> None:
    """Commit the last optimizer step if the loop did not, before the graphs of a model, or a part of one, are read."""
    for tracker in _trackers_in(model):
        tracker.settle_alone()


def _end_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Record the loss in the output: a post-hook, for models that do not call their loss function.

    Kernels that compute the logits and the loss in one, such as Liger's, return no logits, and divide by
    `num_items_in_batch` as the loss function does. A forward that has logits takes a mean of its own.
    """
    tracker: Any = model._symphony_tracker
    if not (model.training and torch.is_grad_enabled()):
        return
    tracker.take_part(output)
    if torch.compiler.is_compiling():
        return
    loss = getattr(output, "loss", None)
    # TRL's trainers make their loss of log-probabilities, and leave the output's own alone.
    is_used = getattr(output, "log_probs", None) is None
    if isinstance(loss, Tensor) and is_used and not tracker.state.recorded_in_forward:
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if shifted is None and isinstance(labels, Tensor):
            shifted = labels[..., 1:] if loss_shifts_labels(model) else labels
        is_mean = isinstance(getattr(output, "logits", None), Tensor)
        num_items = None if is_mean else kwargs.get("num_items_in_batch")
        output.loss = tracker.record_loss(loss, share_of_step(shifted, num_items))


def record_log_probs(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Record `output.log_probs`, whose mean over tokens is the loss of TRL's SFTTrainer: a post-hook."""
    log_probs = getattr(output, "log_probs", None)
    if isinstance(log_probs, Tensor) and model.training and torch.is_grad_enabled():
        output.log_probs = tracker_of(model).record_loss(log_probs, -output.label_mask.float())


def tracker_of(model: nn.Module) -> Tracker:
    """Return the tracker of a Symphony model, found through any wrapper (DDP, DeepSpeed, PEFT, torch.compile).

    Of several in a wrapper, such as a model and its frozen teacher, it is the one that is trained.

    Raises:
        PatchError: If the model is not symphonized, or is a wrapper around several that are trained.
    """
    trackers = trackers_of(model)
    if len(trackers) > 1:
        trackers = [tracker for tracker in trackers if tracker.is_trained()] or trackers
    tracker, *others = trackers
    if others:
        raise PatchError(
            f"{type(model).__name__} holds {1 + len(others)} Symphony models, where one is expected: give that one, or "
            "freeze the others by `requires_grad_(False)`. `update_graphs` and `add_router_losses` take all of them"
        )
    return tracker


def trackers_of(model: nn.Module) -> list[Tracker]:
    """Return the trackers of all Symphony models in a model or wrapper.

    Raises:
        PatchError: If there is none.
    """
    trackers = _trackers_in(model)
    if not trackers:
        raise PatchError(f"{type(model).__name__} is not symphonized: call `symphonize(model)` first")
    return trackers


def _trackers_in(model: nn.Module) -> list[Tracker]:
    held = [module.__dict__ for module in model.modules()]
    whole = [attributes["_symphony_tracker"] for attributes in held if "_symphony_tracker" in attributes]
    # The routers of a part know the model that it is of.
    stacks = [] if whole else [attributes["stack"] for attributes in held if attributes.get("stack") is not None]
    return whole or list(dict.fromkeys(stack.tracker for stack in stacks if isinstance(stack, CoselectionCounter)))


def update_graphs(model: nn.Module) -> bool:
    """Update the graphs with the counts since the last call. Custom loops call it after `optimizer.step()`.

    Args:
        model: A symphonized model, a part of one, or a wrapper around one (DDP, DeepSpeed, PEFT, torch.compile) or
            several.

    Returns:
        True if the graphs were updated. False if nothing was counted since the last update, or if the optimizer that
        is known to hold this model's parameters has not stepped since. Before its first step none is known.

    Raises:
        PatchError: If the model is not symphonized.
    """
    trackers = trackers_of(model)
    moved = [tracker.commit() for tracker in trackers]
    for tracker in trackers:
        if tracker.state.stepped_uncounted:  # which a commit ends
            tracker.checks.warn_once(
                "an optimizer took a step, but nothing had been counted since the last call: the model runs in "
                "evaluation mode, in which `from_pretrained` returns it, so its graphs stay as they are and it has no "
                "router losses. Call `model.train()` before training"
            )
    return any(moved)


def add_router_losses(model: nn.Module, loss: Tensor) -> Tensor:
    """Tie the balance and z-loss to a loss that the loop computed itself. Not needed where `labels` are passed.

    Args:
        model: The Symphony model whose forward made `loss`, or a wrapper around it, or around several that made it.
        loss: The loss, before any division by the number of accumulation steps.

    Returns:
        The same loss. Backward through it starts the router losses too, scaled as it is.

    Raises:
        PatchError: If the model is not symphonized.
    """
    for tracker in trackers_of(model):
        loss = tracker.record_loss(loss)
    return loss
