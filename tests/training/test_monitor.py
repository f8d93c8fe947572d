"""GraphMonitor: metrics in the logs, pictures in the output directory and in the trackers."""

import math

import pytest
import torch
from models import make_ids, make_model, move_graphs
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from symphony_hf import SymphonyCallback, expert_graphs, symphonize
from symphony_hf.diagnostics.graph_metrics import graph_summary
from symphony_hf.errors import SymphonyWarning
from symphony_hf.training.monitor import GraphMonitor, LoadHistory


def test_the_summary_of_two_graphs_by_hand():
    """Loads are 3/4, 1/4, 0 in one graph and 1/3 each in the other; off the diagonal are 2 of 6, and 0."""
    uneven = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    even = torch.eye(3)
    entropy = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(3)
    summary = graph_summary({"a": uneven, "b": even})
    assert summary == pytest.approx(
        {
            "load_entropy": (entropy + 1) / 2,
            "dead_experts": 1 / 6,
            "busiest": (2.25 + 1) / 2,
            "neighbours": 1 / 6,
            "drift": 0.0,
        }
    )
    drift = graph_summary({"b": 2 * even}, {"b": even})["drift"]
    assert drift == pytest.approx(0.5)  # |2I - I| / |2I|


def train(folder, *, steps=4, **settings):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 8)]
    model = move_graphs(symphonize(make_model()))
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback(), GraphMonitor()])
    trainer.train()
    return trainer


@pytest.mark.thorough
def test_metrics_are_in_every_log(tmp_path, real_pictures):
    trainer = train(tmp_path, report_to="none")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    assert all(entry["symphony/drift"] > 0 for entry in logs)
    last = graph_summary(expert_graphs(trainer.model))
    assert logs[-1]["symphony/load_entropy"] == pytest.approx(last["load_entropy"])
    assert (tmp_path / "graphs.png").stat().st_size > 10_000


def test_every_rank_takes_part_in_reading_the_graphs(tmp_path, monkeypatch):
    """Under FSDP2 a learned graph is gathered: a rank that did not would leave the others waiting."""
    model, read = symphonize(make_model()), []
    monkeypatch.setattr("symphony_hf.training.monitor.expert_graphs", lambda model: read.append(1) or {})
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    other = TrainerState(is_world_process_zero=False)
    for call in (GraphMonitor().on_save, GraphMonitor().on_train_end):
        call(arguments, other, TrainerControl(), model=model)
    assert len(read) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_the_loads_of_every_log_are_kept_and_drawn(tmp_path, real_pictures):
    trainer = train(tmp_path, report_to="none")
    history = LoadHistory.read(tmp_path / "load_history.safetensors")
    assert history.steps == [1, 2, 3, 4]
    for name, graph in expert_graphs(trainer.model).items():
        torch.testing.assert_close(history.loads[name][-1], graph.diagonal() / graph.diagonal().sum())
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_a_resumed_run_keeps_earlier_loads(tmp_path):
    train(tmp_path, report_to="none")
    path = tmp_path / "load_history.safetensors"
    model, monitor = move_graphs(symphonize(make_model())), GraphMonitor(pictures=False)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    state = TrainerState(global_step=2, is_world_process_zero=True)  # it was broken off after 4, and saved at 2
    monitor.on_train_begin(arguments, state, None, model=model)
    state.global_step = 5
    monitor.on_log(arguments, state, None, model=model, logs={"loss": 1.0})
    monitor.on_save(arguments, state, None, model=model)
    assert LoadHistory.read(path).steps == [1, 2, 5]
    path.write_bytes(b"damaged")
    state.global_step = 2
    with pytest.warns(SymphonyWarning, match="load_history.safetensors: damaged"):
        monitor.on_train_begin(arguments, state, None, model=model)


def test_a_long_history_is_thinned():
    history = LoadHistory()
    for step in range(1, 1001):
        history.add(step, {"gate": torch.eye(2)})
        assert len(history.steps) == len(history.loads["gate"]) <= LoadHistory.MAX_STEPS
        assert history.steps[-1] == step
    *gaps, last = torch.tensor(history.steps).diff().tolist()
    assert set(gaps) == {4}
    assert 1 <= last <= 4


def test_tensorboard_has_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to=["tensorboard"])
    tags = {}
    for folder in {path.parent for path in tmp_path.rglob("events.out.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        tags |= {tag: kind for kind in ("scalars", "images") for tag in events.Tags()[kind]}
    assert tags["train/symphony/neighbours"] == tags["train/loss"] == "scalars"
    assert tags["symphony/graphs"] == tags["symphony/load"] == "images"


def test_tensorboards_pictures_are_beside_its_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(tmp_path / "run", report_to=["tensorboard"])
    assert {path.parent for path in tmp_path.rglob("events.out.*")} == {tmp_path / "logs", tmp_path / "logs" / "graphs"}


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_are_sent_the_picture(tracker, tmp_path, monkeypatch):
    """Up to the call of the tracker's own logging function: what follows needs its server."""
    module, sent = pytest.importorskip(tracker), []
    monkeypatch.setattr(module, "run", object(), raising=False)
    monkeypatch.setattr(module, "log", sent.append)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    arguments.report_to = [tracker]
    state = TrainerState(global_step=7, is_world_process_zero=True)
    GraphMonitor().on_train_end(arguments, state, None, model=move_graphs(symphonize(make_model())))
    (values,) = sent
    assert values["train/global_step"] == 7
    assert isinstance(values["symphony/graphs"], module.Image)
