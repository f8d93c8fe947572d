"""A model under test: what is left of it once it is released."""

import gc
import weakref

from models import make_model, move_graphs

from symphony_hf import symphonize
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
