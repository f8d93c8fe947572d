"""A run has one progress bar, with the last values. `datasets` shows bars only in a terminal."""

import sys

import datasets
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from symphony_hf.data.datasets import progress_bars
from symphony_hf.training.fit import StepProgress


def test_one_bar_has_the_last_values(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(max_steps=4, is_world_process_zero=True), TrainerControl()
    progress = StepProgress()
    progress.on_train_begin(arguments, state, control)
    progress.on_log(arguments, state, control, logs={"loss": 1.5, "symphony/balance_loss": 1.25, "grad_norm": 3.0})
    progress.on_log(arguments, state, control, logs={"eval_loss": 1.75})
    assert progress.training_bar.postfix == "loss=1.500, balance=1.250, validation=1.750"
    progress.on_prediction_step(arguments, state, control, eval_dataloader=[1, 2])
    assert progress.prediction_bar is None
    progress.on_train_end(arguments, state, control)
    progress.on_log(arguments, state, control, logs={"loss": 1.0})  # after the end, of a measure


@pytest.mark.parametrize(
    ("shown", "terminal", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bars_of_datasets_are_left_as_they_were(shown, terminal, expected, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    datasets.enable_progress_bars()
    with progress_bars(shown):
        assert datasets.are_progress_bars_disabled() is not expected
    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with progress_bars(True):
            assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
