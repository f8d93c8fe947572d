"""Sums over calibration tokens, against loops over single tokens."""

import pytest
import torch
from models import make_ids
from naive_experts import EXPERT, FAMILIES, ROUTE, inputs_of, parts

from symphony_hf.conversion.compression.calibration import calibrate
from symphony_hf.conversion.compression.layers import expert_layers
from symphony_hf.experiments.conformance.tiny import tiny_model


@pytest.mark.parametrize("family", sorted(EXPERT))
def test_sums_equal_loops_over_tokens(family):
    model, ids = tiny_model(family), make_ids(3, 7)
    layers = expert_layers(model)
    seen = calibrate(model, layers, ids, batch_size=2, outputs=True, norms=True)
    hidden = inputs_of(model, [layer.block for layer in layers], ids)
    for layer, statistics, (inputs, _) in zip(layers, seen, hidden, strict=True):
        router, experts = parts(family, model.get_submodule(layer.block))
        number = layer.num_experts
        counts, norms = torch.zeros(number, number), torch.zeros(number)
        means = torch.zeros(number, inputs.shape[1])
        with torch.no_grad():
            for x in inputs:
                choices = ROUTE[family](router, x, list(range(number)))
                for expert, weight in choices:
                    norms[expert] += weight * EXPERT[family](experts, expert, x).norm()
                    for other, _ in choices:
                        counts[expert, other] += 1
                for expert in range(number):
                    means[expert] += EXPERT[family](experts, expert, x) / len(inputs)
        assert torch.equal(statistics.counts, counts.double())
        assert statistics.num_tokens == 21
        torch.testing.assert_close(statistics.adjacency, counts / 21)
        torch.testing.assert_close(statistics.mean_outputs.float(), means, rtol=1e-4, atol=1e-6)
        expected = [float(norms[e] / counts[e, e]) if counts[e, e] else 0.0 for e in range(number)]
        torch.testing.assert_close(statistics.reap.float(), torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_experts_add_up_to_the_block(family):
    """The weighted sum of single experts on a token is the output of the module, in every family."""
    model, ids = tiny_model(family), make_ids(2, 6)
    layer = expert_layers(model)[0]
    calls = []
    handle = layer.experts.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    (hidden, indices, weights), output = calls[0]
    total = torch.zeros_like(hidden)
    with torch.no_grad():
        for token in range(len(hidden)):
            for place in range(layer.top_k):
                one = hidden[token : token + 1], indices[token : token + 1, place : place + 1], torch.ones(1, 1)
                total[token] += weights[token, place] * layer.experts(*one)[0]
    torch.testing.assert_close(total, output, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = tiny_model("olmoe").train()
    layers = expert_layers(model)
    calibrate(model, layers, make_ids(), outputs=True)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
