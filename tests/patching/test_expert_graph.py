"""What an ExpertGraph keeps between forwards is that of its numbers as they are, whoever wrote them."""

import copy

import numpy as np
import pytest
import torch
from models import make_ids, make_model, move_graphs

from symphony_hf import SymphonyConfig, symphonize
from symphony_hf.patching import expert_graph
from symphony_hf.patching.expert_graph import ExpertGraph


def kept_of(graph):
    return graph._kept[2] if graph._kept is not None else None


def naive_residual(graph):
    adjacency = graph.adjacency.double()
    transition = adjacency / adjacency.sum(-1, keepdim=True)
    return graph.config.strength * (transition - torch.eye(len(adjacency), dtype=torch.float64))


WRITES = {
    "in place": lambda graph, new: graph.adjacency.copy_(new),
    "through .data": lambda graph, new: graph.adjacency.data.copy_(new),
    "through NumPy": lambda graph, new: np.copyto(graph.adjacency.numpy(), new.numpy()),
    "another tensor": lambda graph, new: setattr(graph, "adjacency", new.clone()),
    "loaded": lambda graph, new: graph.load_state_dict({"adjacency": new, "updates": torch.tensor(1)}),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_kept_residual_is_that_of_the_graph_as_it_is(write):
    """Whoever writes to the graph, and however: it is compared by its numbers."""
    graph = ExpertGraph(6, 2, SymphonyConfig(strength=0.5))
    first = graph.residual()
    assert graph.residual() is first
    assert not first.any()
    new = torch.rand(6, 6)
    with torch.no_grad():
        WRITES[write](graph, new + new.T)
    torch.testing.assert_close(graph.residual().double(), naive_residual(graph), rtol=0, atol=1e-6)
    assert graph.residual() is kept_of(graph)
    graph.config = SymphonyConfig(strength=0.25)
    torch.testing.assert_close(graph.residual().double(), naive_residual(graph), rtol=0, atol=1e-6)


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_state_dict_in_16_bits_is_widened_however_it_is_assigned(graph):
    model = move_graphs(symphonize(make_model(), graph=graph))
    halves = {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(halves, assign=True)
    for layer, router in enumerate(layer.mlp.gate for layer in model.model.layers):
        assert router.weight.dtype == torch.bfloat16
        assert router.symphony.adjacency.dtype == router.symphony.residual().dtype == torch.float32
        assert isinstance(router.symphony.adjacency, torch.nn.Parameter) == (graph == "learned")
        assert torch.equal(
            router.symphony.adjacency, halves[f"model.layers.{layer}.mlp.gate.symphony.adjacency"].float()
        )


def test_a_residual_kept_in_inference_mode_is_not_used_in_training():
    """Autograd refuses tensors of inference mode."""
    model = move_graphs(symphonize(make_model("olmoe")))
    ids = make_ids()
    with torch.inference_mode():
        before = model(ids).logits
    model(ids, labels=ids).loss.backward()
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_a_residual_that_is_trained_is_not_kept():
    graph = ExpertGraph(6, 2, SymphonyConfig(graph="learned"))
    graph.residual()
    assert graph._kept is None


def test_a_residual_that_ramps_up_is_that_of_the_strength_as_it_is():
    graph = ExpertGraph(6, 2, SymphonyConfig(warmup_steps=4))
    new = torch.rand(6, 6)
    with torch.no_grad():
        graph.adjacency.copy_(new + new.T)
    for updates in range(6):
        graph.updates.fill_(updates)
        share = min(1.0, updates / 4)
        torch.testing.assert_close(graph.residual().double(), share * naive_residual(graph), rtol=0, atol=1e-6)
        assert graph.residual() is kept_of(graph)


def test_a_write_while_a_residual_is_computed_does_not_outlive_it(monkeypatch):
    """Another thread may commit: what is kept then is of the numbers from before, and is computed anew."""
    graph, new, original = ExpertGraph(6, 2, SymphonyConfig()), torch.rand(6, 6), expert_graph.routing_residual

    def residual_beside_a_write(adjacency_EE, *settings):
        found = original(adjacency_EE, *settings)
        graph.adjacency.data.copy_(new + new.T)
        return found

    monkeypatch.setattr(expert_graph, "routing_residual", residual_beside_a_write)
    graph.residual()
    torch.testing.assert_close(graph.residual().double(), naive_residual(graph), rtol=0, atol=1e-6)


def test_a_copy_keeps_its_own():
    graph = ExpertGraph(6, 2, SymphonyConfig())
    with torch.inference_mode():
        graph.residual()
    copied = copy.deepcopy(graph)
    assert copied._kept is None
    with torch.no_grad():
        copied.adjacency.add_(torch.ones(6, 6))
    assert not graph.residual().any()
    assert copied.residual().any()


def test_graphs_of_an_ensemble_are_computed_anew():
    """Under `torch.func`, numbers of a batch of graphs cannot be compared."""
    graph = ExpertGraph(6, 2, SymphonyConfig())
    graph.residual()
    adjacency = torch.rand(3, 6, 6) + 1

    def residual(adjacency_EE):
        return torch.func.functional_call(_Residual(graph), {"graph.adjacency": adjacency_EE}, ())

    for got, one in zip(torch.func.vmap(residual)(adjacency), adjacency, strict=True):
        graph.adjacency = one
        torch.testing.assert_close(got, graph.residual())


class _Residual(torch.nn.Module):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self):
        return self.graph.residual()
