"""The check of an upcycled checkpoint: layers of equal shapes are filled anew in the same memory, one after another."""

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from dense import run, save_dense
from transformers import AutoModelForCausalLM

from symphony_hf.conversion.upcycling import exactness
from symphony_hf.conversion.upcycling.checkpoint import Checkpoint


@pytest.fixture
def layers_seen(monkeypatch):
    """Return the tensors of each module when it was released. They are kept, so that no allocator reuses them."""
    seen, original = [], exactness._release

    def release(module, *args, **settings):
        seen.append({name: tensor.detach() for name, tensor in module.state_dict().items()})
        return original(module, *args, **settings)

    monkeypatch.setattr(exactness, "_release", release)
    return seen


def storages(tensors):
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}


@torch.no_grad()
def test_layers_share_memory_and_the_logits_are_the_models(layers_seen, tmp_path):
    dense, source = save_dense(tmp_path / "dense", "mistral")
    ids = torch.arange(3, 40)[None]
    found = exactness._logits(dense.config, partial(exactness._read, Checkpoint(source)), ids, "")
    assert torch.equal(found, AutoModelForCausalLM.from_pretrained(source).eval()(input_ids=ids).logits)
    _, first, *others, _, _ = layers_seen  # between the embeddings, and the norm and the head
    assert len(set(storages(first).values())) == len(first)
    assert len(others) == 3
    assert all(set(storages(other).values()) == set(storages(first).values()) for other in others)


def test_sparse_and_dense_layers_share_what_has_the_same_size(layers_seen, tmp_path):
    """A layer has storage of its own for each tensor, and one for all experts' copies of one."""
    _, source = save_dense(tmp_path / "dense", "phi3")
    result = run(source, tmp_path / "moe", to="qwen2_moe", layers="every-other", num_experts=3)
    assert 0 < result.exactness.difference <= result.exactness.tolerance
    layers = layers_seen[8:12]  # after the dense model's 7 modules and the embeddings
    for before, after in pairwise(layers):
        sizes = [
            Counter(tensor.untyped_storage().nbytes() for tensor in tensors.values()) for tensors in (before, after)
        ]
        assert sizes[0] != sizes[1]
        assert len(set(storages(after).values())) == len(after)
        shared = set(storages(before).values()) & set(storages(after).values())
        assert len(shared) == (sizes[0] & sizes[1]).total() > 0
    experts = [tensor for name, tensor in layers[1].items() if ".experts." in name]
    assert [tensor.untyped_storage().nbytes() for tensor in experts] == [4 * tensor[0].numel() for tensor in experts]
