"""Stand-ins that let a model run on the meta device as it would on a GPU, and sizes of 4-bit weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from symphony_hf.conversion.inspection.parts import Anatomy, Part
from symphony_hf.conversion.inspection.tensors import held_tensors

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
"""Functions that autocast runs in 16 bits and that transformers models call. Norms and losses cast by themselves."""


class MetaStandIns(TorchFunctionMode):
    """Function mode that replaces operations which the meta device lacks.

    - Conditions on values are True: models ask whether a check holds, or whether nothing is masked.
    - Boolean masks select every element: sequences are full, and all their tokens are predicted.
    - Tokens choose their experts evenly.
    - Attention saves what a fused kernel saves: queries, keys, values, outputs, and one number per row. The meta device
      would take the unfused form, which materializes the scores.
    - Grouped products exist on the meta device in bfloat16 only. In other dtypes each token is multiplied with the
      first expert, at the same cost.
    - Autocast does not support the device: inputs of its 16-bit functions are cast here, each trained weight once, as
      autocast does.

    The mode is not active in the backward pass: pass it to checkpointing as the context of the recomputation.

    Args:
        autocast: Dtype of autocast; None without autocast.
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


TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""Sizes of TRL's tiles: `TOKEN_CHUNK_SIZE` in `trl.kernels.chunked_logprob` and `_CHUNKED_LOGPROB_CHUNK_SIZE` in
`trl.trainer.utils`."""


def head_is_tiled() -> bool:
    """Return whether the installed TRL computes its loss in tiles. Older ones materialize all logits."""
    import trl.trainer.utils

    return hasattr(trl.trainer.utils, "add_fused_lm_head")


def tiled_loss(hidden_BTD: Tensor, weight_VD: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Compute a stand-in for TRL's tiled loss, a float32 scalar, with the same products and memory."""
    loss: Tensor = _TiledHead.apply(hidden_BTD.flatten(0, -2), weight_VD, compute_dtype)
    return loss.sum()


class _TiledHead(torch.autograd.Function):
    """LM head with one tile of logits, recomputed in the backward pass, and gradients accumulated in float32."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.dtype = dtype
        tile = _new_tile(hidden_ND, weight_VD, dtype)
        for tokens in hidden_ND.split(TILE_TOKENS):
            for words in weight_VD.split(TILE_VOCABULARY):
                torch.mm(tokens.to(dtype), words.to(dtype).T, out=tile[: len(tokens), : len(words)])
        return hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        hidden_ND, weight_VD = ctx.saved_tensors
        inputs = zip((hidden_ND, weight_VD), ctx.needs_input_grad, strict=False)
        sums = [torch.empty_like(value, dtype=torch.float32) if needed else None for value, needed in inputs]
        # Products are written into the memory of the sums: the meta device cannot accumulate across dtypes.
        of_hidden, of_weight = (None if s is None else s.view(ctx.dtype)[:, : s.shape[1]] for s in sums)
        tile = _new_tile(hidden_ND, weight_VD, ctx.dtype)
        for row in range(0, len(hidden_ND), TILE_TOKENS):
            tokens = hidden_ND[row : row + TILE_TOKENS].to(ctx.dtype)
            for column in range(0, len(weight_VD), TILE_VOCABULARY):
                words = weight_VD[column : column + TILE_VOCABULARY].to(ctx.dtype)
                part = tile[: len(tokens), : len(words)]
                torch.mm(tokens, words.T, out=part)
                if of_hidden is not None:
                    torch.mm(part, words, out=of_hidden[row : row + TILE_TOKENS])
                if of_weight is not None:
                    torch.mm(part.T, tokens, out=of_weight[column : column + TILE_VOCABULARY])
        hidden, weight = (None if s is None else s.to(v.dtype) for s, v in zip(sums, ctx.saved_tensors, strict=True))
        return hidden, weight, None


def _new_tile(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    return hidden_ND.new_empty(min(len(hidden_ND), TILE_TOKENS), min(len(weight_VD), TILE_VOCABULARY), dtype=dtype)


_BLOCK, _NESTED_BLOCK = 64, 256
_TABLES = 16 * 4 + 256 * 4 + 4
"""Bytes of the two codebooks and of the mean of the scales."""


def packed_bytes(numel: int) -> int:
    """Return the bytes of a weight in NF4 with 8-bit scales: one scale per 64 elements, one scale of scales per 256.

    Source: QLoRA, arXiv 2305.14314, double quantization. Deviation: none.
    """
    scales = -(-numel // _BLOCK)
    return -(-numel // 2) + scales + 4 * -(-scales // _NESTED_BLOCK) + _TABLES


def packed_names(model: Any) -> set[str]:
    """Return the names of the weights that a recipe with `quantization` packs: experts and linear layers, without
    routers and the LM head."""
    anatomy = Anatomy(model)
    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    held = {tensor.name: anatomy.part_of(tensor) for tensor in held_tensors(model) if len(tensor.shape) in (2, 3)}
    stacked = {tensor.name for tensor in held_tensors(model) if len(tensor.shape) == 3}
    return {
        name
        for name, part in held.items()
        if (part is Part.EXPERTS and name in stacked) or (part is not Part.ROUTERS and name in linears)
    }


class _Unpack(nn.Module):
    """Parametrization that unpacks a packed weight at each use."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._shape, self._dtype = weight.shape, weight.dtype

    def forward(self, packed: Tensor) -> Tensor:
        return packed.new_empty(self._shape, dtype=self._dtype)


def pack_experts(model: nn.Module) -> None:
    """Pack stacked experts, and unpack them to 16 bits at each use: autograd saves the unpacked experts."""
    for held in [held for held in held_tensors(model) if len(held.shape) == 3]:
        path, _, name = held.name.rpartition(".")
        module, weight = model.get_submodule(path), held.tensor
        packed = torch.empty(packed_bytes(held.numel), dtype=torch.uint8, device="meta")
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
        parametrize.register_parametrization(module, name, _Unpack(weight), unsafe=True)
