"""Every loop: the graphs and the routers' gradients are those of a plain PyTorch loop over the same micro-batches."""

import copy
import itertools
import warnings
from types import SimpleNamespace

import loop_ranks
import pytest
import torch
import torch.multiprocessing as mp
from loop_ranks import (
    RANKS,
    SETTINGS,
    STEPS,
    Record,
    assert_same,
    line_of,
    make,
    micro_batch,
    plain_loop,
    run_line_of,
    sgd,
    steps_of,
)
from models import make_ids, make_model, move_graphs
from naive_graphs import DECAY, naive_update, spy_on_selections
from naive_losses import WEIGHTS, assert_gradients, reference_gradients
from safetensors.torch import load_file
from trainers import ARGUMENTS, ROWS, sft
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from symphony_hf import (
    PatchError,
    SymphonyCallback,
    SymphonyWarning,
    expert_graphs,
    symphonize,
    unsymphonize,
    update_graphs,
)

assert SETTINGS == {**WEIGHTS, "decay": DECAY}


# Plain PyTorch.


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_plain_loop(accumulation):
    """The reference is checked against naive formulas. Nothing is called before the loop's first optimizer step."""
    model = make()
    seen, before = spy_on_selections(model), expert_graphs(model)
    steps = steps_of(accumulation)
    tensors = plain_loop(model, steps)
    first = [batch for batch, _ in steps[0]]
    expected = reference_gradients(make_model(router_aux_loss_coef=0.0), first)
    assert_gradients({n: tensors[f"grad.0.{n}"] for n in expected}, expected)
    masks = [[batch["attention_mask"].flatten().tolist() for batch, _ in step] for step in steps]
    for name, graph in before.items():
        for step in range(STEPS):
            chosen = seen[name][step * accumulation : (step + 1) * accumulation]
            graph = naive_update(graph, chosen, masks[step])
            torch.testing.assert_close(tensors[f"graph.{step}.{name}"], graph, rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_loops_own():
    model, reference = make(), plain_loop(make(), steps_of(2))
    record, optimizer = Record(model), sgd(model)
    for micro_batches in steps_of(2):
        for batch, weight in micro_batches:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss = run_line_of("any that computes its own loss", model=model, loss=loss)["loss"]
            (loss * weight).backward()
        record.gradients()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(model)
        record.graphs()
    assert_same(record.tensors, reference)


def test_a_loss_scaler_with_accumulation():
    model, reference = make(), plain_loop(make(), steps_of(2))
    record, optimizer = Record(model), sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for micro_batches in steps_of(2):
        for batch, weight in micro_batches:
            scaler.scale(model(**batch).loss * weight).backward()
        scaler.unscale_(optimizer)
        record.gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_graphs(model)
        record.graphs()
    assert_same(record.tensors, reference)


def only_warning(caught):
    messages = [str(w.message) for w in caught if issubclass(w.category, SymphonyWarning)]
    assert len(messages) == 1, messages
    return messages[0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_forgotten_update_is_made_up_for_and_warned_about_once(accumulation):
    """It happens at the first forward after each optimizer step, and so for all but the last."""
    model, reference = make(), plain_loop(make(), steps_of(accumulation))
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, micro_batches in enumerate(steps_of(accumulation)):
            for batch, weight in micro_batches:
                (model(**batch).loss * weight).backward()
                for name, graph in expert_graphs(model).items():
                    assert step == 0 or torch.equal(graph, reference[f"graph.{step - 1}.{name}"])
            optimizer.step()
            optimizer.zero_grad()
    assert "update_graphs" in only_warning(caught)
    update_graphs(model)
    for name, graph in expert_graphs(model).items():
        assert torch.equal(graph, reference[f"graph.{STEPS - 1}.{name}"])


@pytest.mark.parametrize("driver", ["loop", "trainer"])
def test_an_update_that_is_forgotten_after_others_is_made_up_for_and_warned_about_once(driver, tmp_path):
    """The next loop forgets it, after one that moved the graphs, or after a Trainer that was interrupted."""
    model = make()
    if driver == "loop":
        plain_loop(model, steps_of(1))
    else:
        arguments = TrainingArguments(str(tmp_path), **ARGUMENTS)
        rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(12, 8)]
        with pytest.raises(BrokenOffError):
            Trainer(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback(), BreakOff()]).train()
    model.zero_grad()
    again = copy.deepcopy(model)
    reference = [list(expert_graphs(model).values())]
    optimizer = sgd(again)
    for ((batch, _),) in steps_of(1):
        again(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(again)
        reference.append(list(expert_graphs(again).values()))
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, ((batch, _),) in enumerate(steps_of(1)):
            model(**batch).loss.backward()
            graphs = zip(expert_graphs(model).values(), reference[step], strict=True)
            assert all(torch.equal(graph, expected) for graph, expected in graphs)
            optimizer.step()
            optimizer.zero_grad()
    assert "update_graphs" in only_warning(caught)


def test_training_in_evaluation_mode_is_warned_about_once(tmp_path):
    """This is the mode in which `from_pretrained` returns a model."""
    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not update_graphs(model)  # nothing was done yet, and warnings are errors
    optimizer, ids = sgd(model), make_ids()
    model(ids, labels=ids)  # with gradient, which no one uses
    assert not update_graphs(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            assert not update_graphs(model)
            assert not update_graphs(model)
    assert "Call `model.train()`" in only_warning(caught)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert update_graphs(model)
    assert not update_graphs(model)


def test_forgotten_router_losses_are_warned_about_once():
    model = make()
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for micro_batches in steps_of(2):
            for batch, _ in micro_batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            update_graphs(model)
    assert "add_router_losses" in only_warning(caught)


# Trainers.


class BrokenOffError(Exception):
    """Ends a Trainer before its last step."""


class BreakOff(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise BrokenOffError


class Recorder(SymphonyCallback):
    """The user's callback, which also records the micro-batches of each optimizer step with their weights."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.record, self.steps = Record(model), [[]]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.record.gradients()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        self.record.graphs()
        self.steps.append([])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        super().on_train_end(args, state, control, model=model, **kwargs)
        assert self.steps.pop() == []
        assert [len(step) for step in self.steps] == [args.gradient_accumulation_steps] * STEPS
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.record.tensors |= {f"loss.{step}": torch.tensor(loss) for step, loss in enumerate(logged)}


def recording():
    """Return the arguments that the README gives a Trainer, with the recording callback in place of ours."""
    return eval(f"dict({line_of('Trainer')})", {"symphony_hf": SimpleNamespace(SymphonyCallback=Recorder)})


def run_trainer(trainer):
    """Train with a Recorder, and return its records and the micro-batches of each step with their weights."""
    (recorder,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Recorder))
    compute_loss = trainer.compute_loss

    def spy(model, inputs, *args, num_items_in_batch=None, **kwargs):
        batch = {name: inputs[name].clone() for name in ("input_ids", "labels", "attention_mask") if name in inputs}
        if "attention_mask" not in batch:  # padding-free: rows one after the other
            batch["position_ids"] = inputs["position_ids"].clone()
        batch["use_cache"] = False  # else transformers takes no notice of where a packed row begins
        num_labels = (batch["labels"][:, 1:] != -100).sum()
        recorder.steps[-1].append((batch, float(num_labels / num_items_in_batch)))
        return compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    trainer.compute_loss = spy
    with warnings.catch_warnings():
        # torch, of a checkpointed first layer whose input is the embedding of a frozen model.
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        trainer.train()
    return recorder.record.tensors, recorder.steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer(tmp_path, accumulation):
    def collate(rows):
        batches = [micro_batch(row) for row in rows]
        # A row of each, so that micro-batches have different numbers of labels.
        return {name: torch.stack([batch[name][i] for i, batch in enumerate(batches)]) for name in batches[0]}

    arguments = TrainingArguments(
        str(tmp_path), gradient_accumulation_steps=accumulation, remove_unused_columns=False, **ARGUMENTS
    )
    trainer = Trainer(make(), arguments, train_dataset=range(12), data_collator=collate, **recording())
    tensors, steps = run_trainer(trainer)
    assert_same(tensors, plain_loop(make(), steps))


def test_trainer_without_the_callback_is_warned_about_once(tmp_path):
    model = make()
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, **ARGUMENTS)
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(12, 8)]
    with pytest.warns(SymphonyWarning, match="SymphonyCallback") as caught:
        Trainer(model, arguments, train_dataset=rows).train()
    only_warning(caught)


# TRL.


@pytest.fixture
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip("trl")


VARIANTS = {
    "padded": {"gradient_checkpointing": False},
    "checkpointed": {},  # as SFTConfig has it
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 16},
    "wrapped": {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
}


@pytest.mark.parametrize(("variant", "accumulation"), [("padded", 1), *((variant, 2) for variant in VARIANTS)])
def test_sft_trainer(trl, tmp_path, variant, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, **VARIANTS[variant]}
    trainer = sft(trl, make(), tmp_path, **recording(), rows=ROWS if "pad" in variant else ROWS * 3, **settings)
    tensors, steps = run_trainer(trainer)
    # TRL's own loss is not there: the loss is the cross-entropy, no gradient is another's, and 0 is logged of it.
    assert_same(tensors, plain_loop(make(), steps))
    if variant == "padded":
        assert any((batch["attention_mask"] == 0).any() for step in steps for batch, _ in step)
    assert trainer.router_aux_loss_coef == make_model().config.router_aux_loss_coef > 0
    assert {entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry} == {0.0}
    assert all(entry["symphony/z_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_sft_trainer_with_adapters(trl, tmp_path):
    """PEFT's wrappers call the model's forward past its hooks."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    trainer = sft(trl, make(), tmp_path, [Recorder()], gradient_accumulation_steps=2, peft_config=config)
    reference = peft.get_peft_model(make(), config).train()
    reference.load_state_dict(trainer.model.state_dict())  # LoRA begins with random numbers
    tensors, steps = run_trainer(trainer)
    assert_same(tensors, plain_loop(reference, steps))


def test_an_sft_trainer_that_broke_off_leaves_nothing_to_the_next(trl, tmp_path):
    model, num_hooks = make(), []

    class CountHooks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            num_hooks.append(len(model._forward_hooks))

    before = len(model._forward_hooks)
    with pytest.raises(BrokenOffError):
        sft(trl, model, tmp_path, [SymphonyCallback(), BreakOff()]).train()
    sft(trl, model, tmp_path, [SymphonyCallback(), CountHooks()]).train()
    assert set(num_hooks) == {before + 1}
    assert len(model._forward_hooks) == before
    with pytest.raises(BrokenOffError):
        sft(trl, model, tmp_path, [SymphonyCallback(), BreakOff()]).train()
    unsymphonize(model)
    assert not model._forward_hooks


def test_sft_trainer_does_not_add_a_loss_of_its_own(trl, tmp_path):
    model = make()
    trainer = sft(trl, model, tmp_path, [SymphonyCallback()], router_aux_loss_coef=0.01)
    with pytest.raises(PatchError, match="router_aux_loss_coef"):
        trainer.train()
    quiet = make(balance_loss_weight=0.0)
    trainer = sft(trl, quiet, tmp_path, [SymphonyCallback()], router_aux_loss_coef=0.01)
    trainer.train()
    assert all(entry["aux_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_trls_own_loss_is_back_after_unsymphonize(trl, tmp_path):
    runs = []
    for model in (make_model(), unsymphonize(symphonize(make_model()))):
        trainer = sft(trl, model, tmp_path, [])
        trainer.train()
        runs.append([(e["loss"], e["aux_loss"]) for e in trainer.state.log_history if "loss" in e])
    assert runs[0] == runs[1]
    assert trainer.router_aux_loss_coef == make_model().config.router_aux_loss_coef > 0


def test_sft_trainer_without_the_callback_is_warned_about(trl, tmp_path):
    with pytest.warns(SymphonyWarning) as caught:
        sft(trl, make(), tmp_path, []).train()
    messages = [str(w.message) for w in caught if issubclass(w.category, SymphonyWarning)]
    assert len(messages) == 2
    assert any("SymphonyCallback" in message for message in messages)
    assert any("did not reach the routers" in message for message in messages)


# Accelerate.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerates_own_loop(accumulation):
    from accelerate.state import AcceleratorState, GradientState

    try:
        tensors = loop_ranks.accelerate_loop(make(), accumulation)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    assert_same(tensors, plain_loop(make(), steps_of(accumulation)))


@pytest.mark.slow
def test_accelerates_own_loop_on_two_ranks(tmp_path):
    mp.spawn(loop_ranks.run_accelerate, (tmp_path,), nprocs=RANKS)
    for accumulation in (1, 2):
        expected = plain_loop(make(), steps_of(accumulation, RANKS))
        for rank in range(RANKS):
            assert_same(load_file(tmp_path / f"{accumulation}.{rank}.st"), expected)


# DeepSpeed's engine.


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, RANKS])
def test_deepspeeds_engine(tmp_path, ranks):
    pytest.importorskip("deepspeed")
    make_model(output_router_logits=True).save_pretrained(tmp_path / "stock")
    move_graphs(make()).save_pretrained(tmp_path / "ours")
    mp.spawn(loop_ranks.run_deepspeed, (ranks, tmp_path), nprocs=ranks)
    expected = {accumulation: plain_loop(make(), steps_of(accumulation, ranks)) for accumulation in (1, 2)}
    for stage, accumulation, rank in itertools.product((0, 1, 2, 3), (1, 2), range(ranks)):
        assert_same(load_file(tmp_path / f"{stage}.{accumulation}.{rank}.st"), expected[accumulation])
    if ranks == 1:
        half = load_file(tmp_path / "bf16.st")
        reference = plain_loop(make().bfloat16(), steps_of(2), lr=0.0)
        assert all(half[name].dtype == torch.float32 for name in half if name.startswith("graph"))
        # The engine adds micro-batches' gradients up in float32, and the plain loop in bfloat16.
        for name in half:
            if ".mlp.gate." in name:
                torch.testing.assert_close(half[name], reference[name].float(), rtol=0.02, atol=0.01, msg=name)
            if name.startswith("graph"):
                # Some processors round bfloat16 products by how memory is aligned, and parameters in the engine's
                # flat buffers are aligned otherwise: of a step's 22 tokens two may choose another expert.
                atol = 2 * (1 - SETTINGS["decay"]) / 22
                torch.testing.assert_close(half[name], reference[name], rtol=0, atol=atol, msg=name)
    else:
        for how, rank in itertools.product(("zero.Init", "stock", "ours"), range(ranks)):
            reference = plain_loop(move_graphs(make()), steps_of(2, ranks)) if how == "ours" else expected[2]
            assert_same(load_file(tmp_path / f"{how}.{rank}.st"), reference)
