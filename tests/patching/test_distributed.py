"""Two real processes over gloo: every rank ends with the graph of the union of their batches."""

import json

import pytest
import torch
import torch.multiprocessing as mp
from models import gradients, llava_inputs, make_ids, make_model
from ranks import STEPS, learn, learn_of_images, learned_model, move_biases, run_rank
from safetensors.torch import load_file

from symphony_hf import expert_graphs, symphonize, update_graphs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (folder,), nprocs=2)
    return folder


def test_the_ranks_graphs_are_those_of_the_union_batch(folder):
    ranks = [load_file(folder / f"{rank}.st") for rank in range(2)]
    model = symphonize(make_model(), balance_loss_weight=0.0, decay=0.9).train()
    update_graphs(model)
    for step in range(STEPS):
        ids = make_ids(4, 8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        update_graphs(model)
    for name, graph in expert_graphs(model).items():
        # Counts are integers, which sum exactly in any order, so the graphs are equal to the bit.
        assert torch.equal(ranks[0][name], graph)
        assert torch.equal(ranks[1][name], graph)
    for name, gradient in gradients(model).items():
        for rank in ranks:
            torch.testing.assert_close(rank[f"grad.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_ranks_correction_biases_are_those_of_the_union_batch(folder):
    """The sign rule is of integers summed over the ranks: equal to the bit, and moved."""
    expected = move_biases(lambda ids: ids)
    assert expected
    for rank in range(2):
        biases = load_file(folder / f"biases.{rank}.st")
        assert biases.keys() == expected.keys()
        for name, bias in expected.items():
            assert torch.equal(biases[name], bias), name
            assert bias.abs().max() >= 0.125


def test_graphs_that_differ_between_ranks_are_named(folder):
    for rank in range(2):
        message, _ = json.loads((folder / f"{rank}.json").read_text())
        assert message.startswith("1 of 3 graphs differ between the ranks")


def test_a_rank_without_images_takes_part_in_every_commit(folder):
    expected = learn_of_images(lambda step: llava_inputs(seed=step))
    assert len(expected) == 1
    for rank in range(2):
        graphs = load_file(folder / f"images.{rank}.st")
        assert all(torch.equal(graphs[name], graph) for name, graph in expected.items())


def test_uneven_batches_under_join_are_refused_on_every_rank(folder):
    for rank in range(2):
        _, refusal = json.loads((folder / f"{rank}.json").read_text())
        assert "inside `Join`" in refusal


def test_a_learned_graph_under_fsdp2_is_that_of_one_process(folder):
    start, expected = expert_graphs(learned_model()), learn(learned_model(), lambda ids: ids)
    saved = load_file(folder / "state.st")
    for rank in range(2):
        for name, graph in load_file(folder / f"learned.{rank}.st").items():
            moved = (expected[name] - start[name]).abs().max()
            # Gradients summed in another order: a few ulps of the graph's entries, which are about 1.
            torch.testing.assert_close(graph, expected[name], rtol=0, atol=5e-7)
            assert moved > 1e-5, name
            assert torch.equal(graph, graph.T)
            assert torch.equal(saved[f"{name}.symphony.adjacency"], graph)
