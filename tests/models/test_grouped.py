"""Each expert's linear map on its own slice, and one gradient for the stack."""

import pytest
import torch

from symphony_hf.models.upcycled_moe import grouped_linear

LENGTHS = [3, 0, 4, 1]  # nobody chose the second


def tensors(dtype=torch.float64, has_bias=True):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 5, dtype=dtype), torch.randn(4, 6, 5, dtype=dtype)
    bias = torch.randn(4, 6, dtype=dtype) if has_bias else None
    return [None if t is None else t.requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("has_bias", [True, False])
def test_each_slice_goes_through_its_expert(has_bias):
    x, weight, bias = tensors(has_bias=has_bias)
    experts = [torch.nn.functional.linear(x, w, None if bias is None else bias[e]) for e, w in enumerate(weight)]
    of = [e for e, length in enumerate(LENGTHS) for _ in range(length)]
    wanted = torch.stack([experts[e][token] for token, e in enumerate(of)])
    torch.testing.assert_close(grouped_linear(x, weight, bias, LENGTHS), wanted)


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_by_finite_differences(has_bias):
    x, weight, bias = tensors(has_bias=has_bias)
    inputs = [t for t in (x, weight, bias) if t is not None]
    assert torch.autograd.gradcheck(lambda x, w, b=None: grouped_linear(x, w, b, LENGTHS), inputs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen):
    inputs = tensors()
    inputs[frozen].requires_grad_(False)
    grouped_linear(*inputs, LENGTHS).sum().backward()
    assert [t.grad is None for t in inputs] == [n == frozen for n in range(3)]


def test_autocast():
    x, weight, bias = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_linear(x, weight, bias, LENGTHS)
        wanted = torch.nn.functional.linear(x[:3], weight[0], bias[0])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output[:3], wanted)
    output.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_dtypes_of_a_whole_module_under_autocast():
    """The routing's weights and the outputs meet in one type."""
    from symphony_hf.models.dense_mlp import MlpParts
    from symphony_hf.models.upcycled_moe import UpcycledMoE

    torch.manual_seed(0)
    moe = UpcycledMoE(MlpParts("plain", (torch.nn.Linear(8, 12),), torch.nn.Linear(12, 6), torch.nn.GELU()), 4, 2)
    x = torch.randn(10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = moe(x)
    # bfloat16 has 8 bits: products of numbers near 1 round by 2^-9 each.
    torch.testing.assert_close(output.float(), moe(x), atol=0.02, rtol=0.02)
    output.float().sum().backward()
    assert all(p.grad is not None for p in moe.experts.parameters())
