"""A model under test: where it is loaded, what it must have, and what is left of it once it is released."""

import gc
import weakref

import pytest
import torch
from models import make_model, move_graphs
from transformers import AutoModelForCausalLM

from symphony_hf import symphonize
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.checkpoint import ModelUnderTest


def test_a_released_model_is_freed_at_once(tmp_path):
    """A symphonized model refers to itself, and the next model may not fit beside it."""
    move_graphs(symphonize(make_model("olmoe"))).save_pretrained(tmp_path)
    checkpoint = ModelUnderTest(str(tmp_path), None, "auto")
    released = weakref.ref(checkpoint.model)
    gc.disable()
    try:
        checkpoint.release()
        assert released() is None
    finally:
        gc.enable()
    assert checkpoint.model is not None  # loaded again


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    """Transformers would score random ones."""
    make_model("olmoe").model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 1 weights of OlmoeForCausalLM \(lm_head\.weight, "):
        _ = ModelUnderTest(str(tmp_path), None, "auto").model


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_not_missing(tmp_path, tied):
    make_model("olmoe", tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert ModelUnderTest(str(tmp_path), None, "auto").model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("is_there", [False, True])
def test_any_accelerator_is_used(tmp_path, monkeypatch, is_there):
    make_model("olmoe").save_pretrained(tmp_path)
    placed = []

    class Recorded:
        @staticmethod
        def from_pretrained(source, device_map, **settings):
            placed.append(device_map)
            return AutoModelForCausalLM.from_pretrained(source, **settings)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _ = ModelUnderTest(str(tmp_path), None, "auto", Recorded).model
    assert placed == ["auto" if is_there else None]
