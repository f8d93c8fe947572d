"""What a forward on the meta device needs to go through as it would on a GPU: answers, kernels and types."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_IN_16_BITS = {
    F.linear,
    F.conv2d,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
"""What autocast computes in 16 bits, of what models of transformers call. Norms and losses they cast themselves."""


class MetaStandIns(TorchFunctionMode):
    """Stands in for what the meta device lacks.

    - A question about numbers is answered yes: models ask whether a check holds, or whether nothing is masked.
    - Every number that a mask picks out of others is picked: sequences are full, and all their tokens are predicted.
    - Tokens choose their experts evenly.
    - Attention keeps what a fused kernel keeps: queries, keys, values, outputs, and one number a row. The meta device
      would take the unfused form, and its squares of scores.
    - Grouped products are the meta device's own in bfloat16 alone; in another type each token meets the first expert,
      at the same cost.
    - Autocast does not know the device: the products that it computes in 16 bits are cast here, and each trained weight
      once, as it does.

    It does not reach into the backward pass: give it to checkpointing as the context of the recomputation.

    Args:
        autocast: The type that autocast computes in; None without it.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._autocast = autocast
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.__bool__, torch.Tensor.item) and args[0].is_meta and args[0].dtype is torch.bool:
            return True
        if func is torch.Tensor.__getitem__ and _is_mask(args[1]):
            number = torch.arange(args[1].numel(), device="meta")
            return args[0].flatten(0, args[1].dim() - 1)[number]
        if func is torch.bincount and args[0].is_meta:
            each, more = divmod(args[0].numel(), kwargs["minlength"])
            return torch.tensor([each + (expert < more) for expert in range(kwargs["minlength"])])
        if self._autocast is not None and func in _IN_16_BITS and "out" not in kwargs:
            args = [self._cast(value, self._autocast) for value in args]
            kwargs = {name: self._cast(value, self._autocast) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _fused_attention(*args, **kwargs)
        if func is torch._grouped_mm and args[0].is_meta and args[0].dtype is not torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._cast_weights:
            self._cast_weights[id(value)] = value.to(dtype)
        return self._cast_weights[id(value)]


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_meta and index.dtype is torch.bool


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # fused kernels do not repeat keys and values
) -> Tensor:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
