"""SymphonyCallback in the trainer's list of callbacks, and what one training leaves for the next."""

import pytest
import torch
from models import make_ids, make_model
from trainers import train
from transformers import TrainerCallback

from symphony_hf import RoutingMonitor, SymphonyCallback, expert_graphs, symphonize, update_graphs
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.training.monitor import GraphMonitor

ROWS = make_ids(8, 8)


class Reporter(TrainerCallback):
    """Sends each log on as it gets it, like those of TensorBoard and W&B, which come before a user's callbacks."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


@pytest.mark.parametrize("restored", [False, True])
def test_reporters_get_what_ours_add_to_the_logs(restored, tmp_path):
    """Also where Trainer makes the callbacks anew from a checkpoint: it puts them at the end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restored}

    def run(**more):
        ours = [SymphonyCallback(), GraphMonitor(pictures=False), RoutingMonitor(pictures=False)]
        reporter = Reporter()
        train(symphonize(make_model()), ROWS, tmp_path, [reporter, *ours], **settings, **more)
        return reporter.sent

    sent = run(max_steps=2)
    if restored:
        sent = run(max_steps=3, resume=str(tmp_path / "checkpoint-2"))
    logs = [entry for entry in sent if "loss" in entry]
    assert len(logs) == (1 if restored else 2)
    for entry in logs:
        assert {"symphony/balance_loss", "symphony/drift", "routing/margin"} < set(entry)


def test_no_callback_is_called_twice_or_left_out(tmp_path):
    """Ours change places within the event, while the trainer goes through its list."""
    begun = []

    class Note(TrainerCallback):
        def on_train_begin(self, *arguments, **kwargs):
            begun.append(self)

    notes, own = [Note() for _ in range(3)], [SymphonyCallback(), GraphMonitor(pictures=False)]
    mine = [notes[0], own[0], notes[1], own[1], notes[2]]
    trainer = train(symphonize(make_model()), ROWS, tmp_path, mine, max_steps=1)
    assert begun == notes
    assert trainer.callback_handler.callbacks[:2] == own[::-1]
    assert mine == [notes[0], own[0], notes[1], own[1], notes[2]]


class Interrupt(TrainerCallback):
    """Breaks off within the first step, after its first micro-batch."""

    def on_substep_end(self, *arguments, **kwargs):
        raise KeyboardInterrupt


def test_a_training_begins_without_what_one_that_was_broken_off_left(tmp_path):
    """Graphs and logs are those of a model that has the same weights and graphs, and was never trained."""
    model, fresh = symphonize(make_model()), symphonize(make_model())
    with pytest.raises(KeyboardInterrupt):
        train(model, ROWS, tmp_path, [SymphonyCallback(), Interrupt()], gradient_accumulation_steps=2)
    assert tracker_of(model).state.counted
    assert tracker_of(model).state.scale != 0
    logs = []
    for each in (model, fresh):
        each.zero_grad()  # Trainer does so after its steps alone
        trainer = train(each, ROWS, tmp_path, [SymphonyCallback()], max_steps=1, seed=1)  # of other rows
        logs.append(trainer.state.log_history[0]["symphony/balance_loss"])
    assert logs[0] == logs[1]
    assert all(torch.equal(graph, expert_graphs(fresh)[name]) for name, graph in expert_graphs(model).items())


@pytest.mark.filterwarnings("ignore:.*with_router_losses")
def test_a_loss_that_is_not_recorded_gets_no_router_losses_from_one_that_was_broken_off(tmp_path):
    """Their factor is the one that the last recorded loss arrived with."""
    model, fresh = symphonize(make_model()), symphonize(make_model())
    with pytest.raises(KeyboardInterrupt):
        train(model, ROWS, tmp_path, [SymphonyCallback(), Interrupt()], gradient_accumulation_steps=2)
    for each in (model, fresh):
        each.zero_grad()
        train(each, ROWS, tmp_path, [SymphonyCallback()], max_steps=1, label_smoothing_factor=0.1)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_a_step_that_was_taken_before_the_interrupt_still_moves_the_graphs(tmp_path):
    class InterruptStep(TrainerCallback):
        def on_optimizer_step(self, *arguments, **kwargs):
            raise KeyboardInterrupt

    model = symphonize(make_model())
    with pytest.raises(KeyboardInterrupt):
        train(model, ROWS, tmp_path, [SymphonyCallback(), InterruptStep()])
    train(model, ROWS, tmp_path, [SymphonyCallback()], max_steps=2)
    assert model.model.layers[0].mlp.gate.symphony.updates == 3


def plain_loop(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.train()(input_ids=ROWS[:2], labels=ROWS[:2]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    update_graphs(model)


@pytest.mark.parametrize("before", ["trainer", "loop"])
def test_the_first_log_is_of_this_training_alone(before, tmp_path):
    """A training ends between two logs, and a loop of one's own never takes the losses."""
    model = symphonize(make_model())
    if before == "trainer":
        train(model, ROWS, tmp_path, [SymphonyCallback()], max_steps=1, logging_steps=2)
    else:
        plain_loop(model)
    assert tracker_of(model).state.logged_losses is not None
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *arguments, **kwargs):
            seen.append(tracker_of(model).state.logged_losses[0, 2].item())

    train(model, ROWS, tmp_path, [SymphonyCallback(), Look()], max_steps=1)
    assert seen == [1]  # forwards
