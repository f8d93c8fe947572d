"""RoutingMonitor: metrics of the routing of a stock model in the logs of its Trainer."""

import pytest
import torch
from models import make_ids, make_model
from trainers import Rows
from transformers import Trainer, TrainerState, TrainingArguments

from symphony_hf import RoutingMonitor, SymphonyCallback, UnsupportedModelError, symphonize
from symphony_hf.diagnostics.graph_metrics import graph_summary
from symphony_hf.errors import SymphonyWarning
from symphony_hf.experiments.conformance.naive import naive_counts, watch_choices
from symphony_hf.training.monitor import GraphMonitor, LoadHistory
from symphony_hf.training.trainer import ResumableFlow


def train(model, folder, *callbacks, steps=4, resume=None, **settings):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        per_device_train_batch_size=2, report_to="none", **{"logging_steps": 2, "save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(make_ids(8, 8)), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [type(module) for module in model.modules()], list(model.state_dict()), hooks


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stock_model_is_watched_and_trains_the_same(accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "gradient_checkpointing": accumulation == 2}
    plain = train(make_model(), tmp_path / "plain", **settings).model
    model = make_model()
    trainer = train(model, tmp_path / "watched", RoutingMonitor(), **settings)
    assert state_of(model) == state_of(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert 0 < entry["routing/load_entropy"] <= 1
        assert entry["routing/margin"] > 0
        assert {f"routing/model.layers.{layer}.mlp.gate/busiest" for layer in range(3)} < set(entry)
        assert entry["routing/busiest"] == pytest.approx(
            sum(entry[f"routing/model.layers.{layer}.mlp.gate/busiest"] for layer in range(3)) / 3
        )
    assert (tmp_path / "watched" / "routing_graphs.png").is_file()
    assert LoadHistory.read(tmp_path / "watched" / "routing_load_history.safetensors").steps == [2, 4]


def test_the_graph_is_the_naive_count(tmp_path):
    """One step, without a moving average, of one forward."""
    model = make_model()
    seen = watch_choices(model)
    trainer = train(model, tmp_path, RoutingMonitor(pictures=False, decay=0.0), steps=1, logging_steps=1)
    graphs = {}
    for name, notes in seen.items():
        pairs, num_tokens = naive_counts(notes, torch.ones(1, len(notes[0])), 8)
        graphs[name] = pairs / num_tokens
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in graph_summary(graphs).items():
        if name != "drift":
            assert entry[f"routing/{name}"] == pytest.approx(value, abs=1e-6)


def test_a_router_that_has_collapsed_is_seen_at_once(tmp_path):
    """All tokens choose the same 2 of 8 experts, and the average has not begun at an even load."""
    model = make_model(num_experts_per_tok=2)

    def collapse(module, args, output):
        logits, weights, indices = output
        return logits, weights, torch.arange(2).expand_as(indices).clone()

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(collapse)
    trainer = train(model, tmp_path, RoutingMonitor(pictures=False), steps=3, logging_steps=1)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["routing/busiest"] for entry in logs] == pytest.approx([4.0] * 3)
    assert [entry["routing/dead_experts"] for entry in logs] == [0.75] * 3


def observed(monitor, batches, state=None):
    """Let a monitor observe batches, one a step, and return its graphs."""
    model = make_model()
    arguments = TrainingArguments("unused", use_cpu=True, report_to="none", logging_steps=1)
    state = state or TrainerState(logging_steps=1)
    monitor.on_train_begin(arguments, state, None, model=model)
    for ids in batches:
        monitor.on_step_begin(arguments, state, None, model=model)
        model(input_ids=ids)
        state.global_step += 1
    return monitor.graphs_of(model)


def test_the_first_observations_weigh_the_same():
    batches = [make_ids(seed=seed) for seed in range(4)]
    single = [observed(RoutingMonitor(pictures=False), [ids]) for ids in batches]
    for name, graph in observed(RoutingMonitor(pictures=False, decay=0.7), batches[:3]).items():
        torch.testing.assert_close(graph, sum(graphs[name] for graphs in single[:3]) / 3)
    for name, graph in observed(RoutingMonitor(pictures=False, decay=0.7), batches).items():
        before = sum(graphs[name] for graphs in single[:3]) / 3
        torch.testing.assert_close(graph, 0.7 * before + 0.3 * single[3][name])  # 0.7 is less than 1 - 1 / 4


def test_a_checkpoint_that_did_not_count_observations_goes_on_with_the_plain_decay():
    first, second = make_ids(seed=0), make_ids(seed=1)
    monitor = RoutingMonitor(pictures=False, decay=0.6)
    before, alone = observed(monitor, [first]), observed(RoutingMonitor(pictures=False), [second])
    saved = monitor.state()
    saved["attributes"].pop("num_seen", None)
    state = TrainerState(logging_steps=1, global_step=1, stateful_callbacks={"RoutingMonitor": saved})
    for name, graph in observed(RoutingMonitor(pictures=False, decay=0.6), [second], state).items():
        torch.testing.assert_close(graph, 0.6 * before[name] + 0.4 * alone[name])


def test_routers_that_choose_all_experts_have_no_margin(tmp_path):
    """There is no other expert: the margin is infinite for each token."""
    model = make_model(num_experts_per_tok=8)
    trainer = train(model, tmp_path, RoutingMonitor(pictures=False), steps=1, logging_steps=1)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["routing/busiest"] == pytest.approx(1.0)
    assert not [name for name in entry if "margin" in name]


def test_a_resumed_run_goes_on_with_its_moving_average(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    logged = []
    for folder, resume in ((tmp_path / "whole", None), (tmp_path / "again", str(tmp_path / "whole/checkpoint-3"))):
        callbacks = (RoutingMonitor(pictures=False), SymphonyCallback())
        model = symphonize(make_model())  # a stock Trainer would resume a stock model without its experts
        trainer = train(model, folder, *callbacks, steps=6, resume=resume, **settings)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > 3]
        logged.append([{k: v for k, v in entry.items() if k.startswith("routing/")} for entry in entries])
    assert len(logged[0]) == 2
    assert logged[1] == logged[0]


def test_a_log_between_two_observations_has_no_metrics(tmp_path):
    """It is added before a checkpoint, and would repeat the last margin, with a drift of 0."""
    model = symphonize(make_model())
    arguments = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    callbacks = (ResumableFlow(), SymphonyCallback(), RoutingMonitor(pictures=False))
    trainer = train(model, tmp_path, *callbacks, steps=6, **arguments)
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert [step for step, entry in logs.items() if "routing/drift" in entry] == [2, 4, 6]
    assert 3 in logs


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_each_log_of_an_epoch_has_metrics(strategy, tmp_path):
    """An epoch has four steps."""
    model = symphonize(make_model())
    trainer = train(
        model, tmp_path, SymphonyCallback(), RoutingMonitor(pictures=False), steps=8, logging_strategy=strategy
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == (2 if strategy == "epoch" else 4)
    assert all(entry["routing/drift"] > 0 for entry in logs)


def test_padding_is_left_out():
    model, monitor = make_model(), RoutingMonitor(pictures=False, decay=0.0)
    arguments = TrainingArguments("unused", use_cpu=True, report_to="none")
    state = Trainer(model, arguments).state
    state.logging_steps, ids = 1, make_ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seen = watch_choices(model)
    monitor.on_train_begin(arguments, state, None, model=model)
    monitor.on_step_begin(arguments, state, None, model=model)
    model(input_ids=ids, attention_mask=mask)
    for name, graph in monitor.graphs_of(model).items():
        pairs, num_tokens = naive_counts(seen[name], mask, 8)
        torch.testing.assert_close(graph, pairs / num_tokens)


@pytest.mark.thorough
def test_it_watches_a_symphonized_model_beside_its_own_metrics(tmp_path):
    """Each monitor has files of its own: the graph moves by its own decay, and this average by another."""
    trainer = train(symphonize(make_model()), tmp_path, SymphonyCallback(), GraphMonitor(), RoutingMonitor())
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"symphony/balance_loss", "routing/margin"} < set(entry)
    own, routing = (LoadHistory.read(tmp_path / f"{stem}load_history.safetensors") for stem in ("", "routing_"))
    assert own.steps == routing.steps == [2, 4]
    assert not any(torch.equal(own.loads[name][-1], rows[-1]) for name, rows in routing.loads.items())
    assert {path.name for path in tmp_path.glob("*.png")} == {
        *("graphs.png", "load.png", "routing_graphs.png", "routing_load.png")
    }


def test_a_folder_of_the_first_releases_keeps_its_loads(tmp_path):
    """They had no `routing_` in the name. Of a symphonized model, such a file may be GraphMonitor's."""
    history = LoadHistory()
    history.add(1, {"model.layers.0.mlp.gate": torch.eye(8)})
    history.write(tmp_path / "load_history.safetensors")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=3, is_world_process_zero=True)
    for model, steps in ((make_model(), [1, 3]), (symphonize(make_model()), [3])):
        monitor = RoutingMonitor(pictures=False)
        monitor.on_train_begin(arguments, state, None, model=model)
        monitor._is_new = True
        monitor.on_log(arguments, state, None, model=model, logs={"loss": 1.0})
        monitor.on_save(arguments, state, None, model=model)
        written = tmp_path / "routing_load_history.safetensors"
        assert LoadHistory.read(written).steps == steps
        written.unlink()


def test_it_warns_only_if_it_watched_and_saw_nothing(tmp_path):
    """A resumed run may log, as it does before a save, before the first step at which it watches."""
    model, monitor = make_model(), RoutingMonitor(pictures=False)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", logging_steps=10)
    state = TrainerState(global_step=3, logging_steps=10)
    monitor.on_train_begin(arguments, state, None, model=model)
    monitor.on_step_begin(arguments, state, None, model=model)
    monitor.on_log(arguments, state, None, model=model, logs={"loss": 1.0})
    state.global_step = 9
    monitor.on_step_begin(arguments, state, None, model=model)
    with pytest.warns(SymphonyWarning, match="no router was seen to run"):
        monitor.on_log(arguments, state, None, model=model, logs={"loss": 1.0})


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no router found"):
        train(torch.nn.Linear(2, 2), tmp_path, RoutingMonitor())
