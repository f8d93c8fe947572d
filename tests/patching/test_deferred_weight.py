"""A graph is applied to the product in float32, where that is cheap, and in 16 bits to the weight, as in folding."""

import pytest
import torch
import torch.nn.functional as F
from models import make_model, move_graphs
from torch.utils.flop_counter import FlopCounterMode

from symphony_hf import symphonize
from symphony_hf.patching.families.substitution import DeferredWeight

E, D, T = 5, 7, 3
MATRIX = torch.rand(E, E, generator=torch.Generator().manual_seed(0))


def deferred(tensor):
    return DeferredWeight(tensor, lambda rows: MATRIX @ rows, lambda product: product @ MATRIX.T)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight, bias: F.linear(x, weight, bias),
        lambda x, weight, bias: F.linear(x.float(), weight.float(), bias.to(torch.float32)),
        lambda x, weight, bias: F.linear(x.type(torch.float32), weight.type(torch.float32)) + bias,
        lambda x, weight, bias: F.linear(input=x, weight=weight, bias=bias),
        lambda x, weight, bias: x @ weight.T + bias,
        lambda x, weight, bias: torch.addmm(bias, x, weight.t()),
        lambda x, weight, bias: torch.matmul(x, weight[:].transpose(0, 1)) + bias,
        lambda x, weight, bias: F.linear(x, weight.double().to(weight.dtype)) + bias,
    ],
)
def test_whatever_a_forward_does_is_done_with_the_changed_weight(multiply):
    x, weight, bias = normal(T, D), normal(E, D), normal(E)
    expected = x @ (MATRIX @ weight).T + MATRIX @ bias
    torch.testing.assert_close(multiply(x, deferred(weight), deferred(bias)), expected)


def test_it_has_the_weights_type_and_shape():
    weight = deferred(normal(E, D))
    assert (weight.dtype, tuple(weight.shape), weight.device.type) == (torch.float32, (E, D), "cpu")
    assert weight.to(torch.float32) is weight.float() is weight
    assert torch.equal(weight.to(torch.bfloat16), (MATRIX @ normal(E, D)).to(torch.bfloat16))


def test_gradients_are_those_of_the_changed_weight():
    gradients = []
    for form in (deferred, lambda tensor: MATRIX @ tensor):
        x, weight, bias = (tensor.requires_grad_() for tensor in (normal(T, D), normal(E, D), normal(E)))
        F.linear(x, form(weight), form(bias)).square().sum().backward()
        gradients.append((x.grad, weight.grad, bias.grad))
    torch.testing.assert_close(*gradients)


def flops_of_router(model, tokens):
    gate = model.model.layers[0].mlp.gate
    hidden = torch.zeros(tokens, gate.weight.shape[1], dtype=gate.weight.dtype)
    with FlopCounterMode(display=False) as counter:
        gate(hidden)
    return counter.get_total_flops()


def test_a_token_costs_a_product_with_the_graph_and_in_16_bits_a_product_of_graph_and_weight(family):
    model = move_graphs(symphonize(make_model(family))).eval()
    num_experts, hidden_size = model.model.layers[0].mlp.gate.weight.shape
    plain, graph = 2 * num_experts * hidden_size, 2 * num_experts**2
    for tokens in (1, 9):
        assert flops_of_router(model, tokens) == tokens * (plain + graph)
        with torch.autocast("cpu", torch.bfloat16):
            assert flops_of_router(model, tokens) == tokens * plain + graph * hidden_size
    assert flops_of_router(model.to(torch.bfloat16), 1) == plain + graph * hidden_size
