"""Padding among a stack's tokens: from the mask that the stack is given, or a model around it."""

import inspect
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

OF_TOKENS = "attention_mask"
OF_DECODER = "decoder_attention_mask"


def is_padding_mask(mask: Any) -> TypeGuard[Tensor]:
    """Whether an attention mask says which tokens are padding. Shape: (rows, positions)."""
    return isinstance(mask, Tensor) and mask.dim() == 2


class GivenMasks:
    """The masks that the models around a stack were given, in the forwards under way."""

    def __init__(self) -> None:
        self._given: list[dict[str, Any]] = []  # outermost model first

    def begin(self, given: dict[str, Any]) -> None:
        """Note the masks of a forward that begins, by the name of the argument."""
        self._given.append(given)

    def end(self) -> None:
        """Forget those of a forward that ends."""
        if self._given:
            self._given.pop()

    def clear(self) -> None:
        """Forget all: a KeyboardInterrupt in a forward passes by the hook that ends it."""
        self._given.clear()

    def find(self, name: str) -> Tensor | None:
        """Return the innermost mask of this name that says which tokens are padding. Shape: (rows, positions)."""
        return next((given[name] for given in reversed(self._given) if is_padding_mask(given[name])), None)

    def tells_padding(self, name: str) -> bool:
        """Whether padding is known: there is such a mask, or none was given, and so there is no padding."""
        return bool(self._given) and (self._given[0][name] is None or self.find(name) is not None)


class MaskHooks:
    """Hooks that note a model's masks while its forward runs. It may hand others to its stack, with four dimensions.

    Args:
        model: A model around a stack.
        masks: Where they are noted.
        is_outermost: Whether no other model is around it.
    """

    def __init__(self, model: nn.Module, masks: GivenMasks, is_outermost: bool) -> None:
        self.masks = masks
        self.is_outermost = is_outermost
        self._names = list(inspect.signature(model.forward).parameters)
        self._shifts_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the masks: a pre-hook."""
        if self.is_outermost:
            self.masks.clear()
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given = {name: arguments.get(name) for name in (OF_TOKENS, OF_DECODER)}
        if self._shifts_labels and given[OF_DECODER] is None:
            given[OF_DECODER] = _mask_of_labels(arguments)
        self.masks.begin(given)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget them: a post-hook that also runs after an Exception."""
        self.masks.end()


def _mask_of_labels(arguments: dict[str, Any]) -> Tensor | None:
    """Return the mask of the decoder's inputs where the model makes them of its labels; None where it does not.

    The labels move one position to the right, behind a start token, and -100 becomes padding. Shape: (rows, positions).
    """
    labels = arguments.get("labels")
    is_made = arguments.get("decoder_input_ids") is None and arguments.get("decoder_inputs_embeds") is None
    if not (is_made and isinstance(labels, Tensor) and labels.dim() == 2):
        return None
    return torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], dim=1)


def watch_masks(model: nn.Module, owners: list[nn.Module], masks: GivenMasks) -> list[Any]:
    """Register the hooks on every model around a stack: a loop may call an inner one. Returns the handles.

    Args:
        model: The outermost model.
        owners: The modules whose forwards run the stacks.
        masks: Where the masks are noted.
    """
    stacks, handles = set(map(id, owners)), []
    for module in model.modules():
        is_model = module is model or isinstance(module, PreTrainedModel)
        if is_model and any(id(part) in stacks and part is not module for part in module.modules()):
            hooks = MaskHooks(module, masks, module is model)
            handles.append(module.register_forward_pre_hook(hooks.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(hooks.end, always_call=True))
    return handles


def mask_name(model: nn.Module, owner: nn.Module) -> str:
    """Return the argument of the models around a stack that says which of the stack's tokens are padding."""
    for module in model.modules():
        is_pair = isinstance(module, PreTrainedModel) and getattr(module.config, "is_encoder_decoder", False)
        if is_pair and module is not owner and module.get_decoder() is owner:  # type: ignore[operator]
            return OF_DECODER
    return OF_TOKENS


def mask_position(owner: nn.Module) -> int | None:
    """Return the position of `attention_mask` in a module's forward, if it may be passed by position."""
    names = list(inspect.signature(owner.forward).parameters)
    return names.index(OF_TOKENS) if OF_TOKENS in names else None


def mask_of_tokens(record: Any, contract: Any, num_tokens: int, checks: Any) -> Tensor | None:
    """Return which of a router's tokens are real; None if all are, or if it is not known, with a warning.

    Args:
        record: The record of the forward, with its masks.
        contract: The router's contract, which says whether it gets text, images or both.
        num_tokens: Number of tokens that the router gets.
        checks: The model's checks, which warn.
    """
    mask_T, image_T = record.mask_T, record.image_T
    if contract.image_tokens and image_T is None:
        return None  # a vision tower's or projector's: there the text's mask means nothing
    if mask_T is None or mask_T.numel() == num_tokens:
        return mask_T
    if contract.image_tokens is not None and image_T is not None:
        mask_T = mask_T[image_T if contract.image_tokens else ~image_T]
        if mask_T.numel() == num_tokens:
            return mask_T
    checks.warn_once(
        f"the attention mask has {mask_T.numel()} entries, the router {num_tokens} tokens: padding, if there is any, "
        "is counted like other tokens"
    )
    return None
