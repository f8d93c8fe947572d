"""The loss of a finished run is of the tokens, however they are put into batches and processes."""

import json

import pytest
import torch
from loss_ranks import answered_rows, final_loss, run_rank
from models import make_model

from symphony_hf.data.blocks import NO_LABEL


def mean_over_tokens(rows):
    model, losses = make_model("olmoe"), []
    for row in rows:
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, t] for i, t in enumerate(row["labels"]) if t != NO_LABEL]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_loss_is_the_mean_over_tokens(batch_size, tmp_path):
    rows = answered_rows(1, 9, 2, 5, 1)
    # float32 logits of padded batches, in sums of another order.
    expected = pytest.approx(mean_over_tokens(rows), rel=1e-5)
    assert final_loss(tmp_path, rows, batch_size) == (expected, expected)


@pytest.mark.slow
def test_several_processes_have_the_same_loss(tmp_path):
    """Each has batches of its own numbers of tokens; one batch has none."""
    rows = answered_rows(1, 9, 0, 4)
    torch.multiprocessing.spawn(run_rank, (2, tmp_path, rows), nprocs=2)
    expected = pytest.approx(mean_over_tokens(rows), rel=1e-5)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [expected, expected]
