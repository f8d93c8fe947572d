"""Trainers that compute their own loss: `with_router_losses` adds the router losses, and references are synced."""

import copy
from types import SimpleNamespace

import pytest
import torch
from clients import write_format_1
from datasets import Dataset
from models import make_ids, make_model, move_graphs
from trainers import make_tokenizer
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from symphony_hf import ConfigError, PatchError, SymphonyCallback, add_router_losses, symphonize, with_router_losses
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.training.fit import train
from symphony_hf.training.reference_model import mix_graphs
from symphony_hf.training.router_losses import _counted_labels, _share_of_step

NUMBERS = [str(i) for i in range(16)]
COMMON = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "max_grad_norm": 0.0,
}
DATA = {
    "dpo": [{"prompt": f"{i} ", "chosen": f"{i} 3", "rejected": "9"} for i in NUMBERS],
    "kto": [{"prompt": f"{i} ", "completion": f"{i} 3", "label": int(i) % 2 == 0} for i in NUMBERS],
    "reward": [{"chosen": f"{i} 3 4", "rejected": f"{i} 9"} for i in NUMBERS],
    "sft": [{"text": f"{i} 3 4 5"} for i in NUMBERS],
    "grpo": [{"prompt": f"{i} "} for i in NUMBERS],
    "gkd": [{"messages": [{"role": "user", "content": i}, {"role": "assistant", "content": "3 4"}]} for i in NUMBERS],
    "tpo": [{"prompt": f"{i} ", "chosen": f"{i} 3", "rejected": "9", "reference": "4"} for i in NUMBERS],
    "sdft": [{"prompt": f"{i} ", "privileged_context": "3 4"} for i in NUMBERS],
}
DATA |= dict.fromkeys(("rloo", "gmpo", "distillation", "online"), DATA["grpo"]) | dict.fromkeys(
    ("cpo", "orpo"), DATA["dpo"]
)
GENERATES = {"num_generations": 2, "max_completion_length": 4}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "sft": (SFTTrainer, SFTConfig, {"loss_type": "dft"}),
    "grpo": (GRPOTrainer, GRPOConfig, GENERATES),
    "rloo": (RLOOTrainer, RLOOConfig, {**GENERATES, "beta": 0.0}),
    "gmpo": (GMPOTrainer, GMPOConfig, GENERATES),
    "distillation": (DistillationTrainer, DistillationConfig, {"max_completion_length": 4}),
    "gkd": (GKDTrainer, GKDConfig, {"max_new_tokens": 4}),
    "cpo": (CPOTrainer, CPOConfig, {"max_length": 16}),
    "orpo": (ORPOTrainer, ORPOConfig, {"max_length": 16}),
    "tpo": (TPOTrainer, TPOConfig, {}),
    "sdft": (SDFTTrainer, SDFTConfig, {**GENERATES, "teacher_model_kind": "live", "distillation_topk": 8}),
}
REWARDED = ("grpo", "rloo", "gmpo", "online")
TAUGHT = ("distillation", "gkd")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def model_for(kind, **settings):
    model = make_model("olmoe" if kind != "reward" else "mixtral", experts="eager")
    if kind == "reward":
        torch.manual_seed(0)
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, experts_implementation="eager")
    return symphonize(model, **{"decay": 0.5, **settings})


class Keep(SymphonyCallback):
    """Also keeps the batches of the policy's decoder in training, and the gradient of its first router."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.batches = []
        model.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, decoder, args, kwargs):
        if decoder.training and torch.is_grad_enabled():
            input_ids = args[0] if args else kwargs["input_ids"]
            self.batches.append({"input_ids": input_ids.clone(), "attention_mask": kwargs["attention_mask"].clone()})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = gradient_of(model).clone()


def gradient_of(model):
    return model.model.layers[0].mlp.gate.weight.grad


def trained(kind, wrap, tokenizer, tmp_path, **settings):
    """Train one step. Returns the callback, with the first router's gradient, and the names of the logged losses."""
    trainer_class, config_class, extra = TRAINERS[kind]
    model = model_for(kind, **settings)
    arguments = config_class(output_dir=str(tmp_path / "out"), **COMMON, **extra)
    more = {}
    if kind in REWARDED:
        more["reward_funcs"] = lambda completions, **_: [float(place % 2) for place, _ in enumerate(completions)]
    if kind in ("dpo", "kto"):
        more["ref_model"] = model_for(kind, **settings)
    if kind in TAUGHT:
        more["teacher_model"] = make_model("olmoe", seed=1, experts="eager")
    trainer = (with_router_losses(trainer_class) if wrap else trainer_class)(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(DATA[kind]),
        processing_class=tokenizer,
        callbacks=[kept := Keep()],
        **more,
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("symphony/")}
    return kept, logged


@pytest.mark.thorough
@pytest.mark.parametrize("kind", sorted(TRAINERS))
@pytest.mark.filterwarnings("ignore")
def test_with_router_losses_adds_the_router_losses(kind, tokenizer, tmp_path):
    """It adds their gradient on the same batches, once, and only then are they logged."""
    weights = {"balance_loss_weight": 1e-3, "z_loss_weight": 1e-4}
    without, unlogged = trained(kind, False, tokenizer, tmp_path, **weights)
    kept, logged = trained(kind, True, tokenizer, tmp_path, **weights)
    assert not unlogged
    assert logged == {"symphony/balance_loss", "symphony/z_loss"}
    model = model_for(kind, **weights).train()
    for batch in kept.batches:
        add_router_losses(model, 0.0 * model.model(**batch).last_hidden_state.sum()).backward()
    # The trainers' own gradients are between 4e-6 and 1e-3 here, and those of the router losses near 1e-4.
    torch.testing.assert_close(kept.gradient - without.gradient, gradient_of(model), rtol=1e-4, atol=1e-8)
    assert without.gradient.abs().max() > 1e-6


def test_label_smoothing_gets_router_losses_and_a_plain_trainer_gets_them_once(tmp_path):
    """For label smoothing, Trainer does not pass the labels to the model."""
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(4, 8)]

    def gate(trainer_class, smoothing):
        model = symphonize(make_model(), balance_loss_weight=1.0, z_loss_weight=0.5)
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", disable_tqdm=True,
            label_smoothing_factor=smoothing, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer_class(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()]).train()
        return model.model.layers[0].mlp.gate.weight.detach()

    wrapped = with_router_losses(Trainer)
    assert torch.equal(gate(wrapped, 0.0), gate(Trainer, 0.0))
    with pytest.warns(UserWarning, match="with_router_losses"):
        unsmoothed = gate(Trainer, 0.1)
    assert not torch.equal(gate(wrapped, 0.1), unsmoothed)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_needs_nothing_trains_the_same(tokenizer, tmp_path):
    """SFTTrainer's default loss records the router losses in the forward: they are not added a second time."""
    TRAINERS["sft_nll"] = (SFTTrainer, SFTConfig, {})
    DATA["sft_nll"] = DATA["sft"]
    (plain, logged), (wrapped, logged_again) = (trained("sft_nll", wrap, tokenizer, tmp_path) for wrap in (False, True))
    assert torch.equal(plain.gradient, wrapped.gradient)
    assert logged == logged_again != set()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_bypasses_compute_loss_is_refused(tokenizer, tmp_path):
    TRAINERS["online"] = (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 4})
    with pytest.raises(PatchError, match="OnlineDPOTrainer computes its loss in `training_step`"):
        trained("online", True, tokenizer, tmp_path)


def test_a_recipe_with_label_smoothing_gets_router_losses(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", disable_tqdm=True,
        label_smoothing_factor=0.1, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    trainer = train(symphonize(make_model()), rows, None, arguments)
    assert "symphony/balance_loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_does_not_multiply_router_losses(smoothing, tmp_path):
    """The z-loss is a mean over tokens, so four micro-batches of one row equal one micro-batch of four."""
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(4, 8)]

    def gate(micro_batch):
        model = symphonize(make_model(), balance_loss_weight=0.0, z_loss_weight=1.0)
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", disable_tqdm=True, optim="sgd",
            label_smoothing_factor=smoothing, dataloader_pin_memory=False, learning_rate=0.1, max_grad_norm=0.0,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=4 // micro_batch,
        )  # fmt: skip
        with_router_losses(Trainer)(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()]).train()
        return model.model.layers[0].mlp.gate.weight.detach()

    torch.testing.assert_close(gate(1), gate(4))


def test_label_smoothing_weighs_router_losses_by_tokens(tmp_path):
    """As the cross-entropy, of two micro-batches with 3 and 11 labels: the same as without label smoothing.

    Plain gradient descent of one step is linear in the losses, so that the z-loss adds the same to the router.
    """
    rows = [{"input_ids": ids, "labels": torch.cat([ids[:kept], torch.full((12 - kept,), -100)])}
            for ids, kept in zip(make_ids(2, 12), (4, 12), strict=True)]  # fmt: skip

    def gate(smoothing, weight):
        model = symphonize(make_model(), balance_loss_weight=0.0, z_loss_weight=weight)
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", disable_tqdm=True, optim="sgd",
            label_smoothing_factor=smoothing, dataloader_pin_memory=False, learning_rate=0.1, max_grad_norm=0.0,
            per_device_train_batch_size=1, gradient_accumulation_steps=2,
        )  # fmt: skip
        with_router_losses(Trainer)(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()]).train()
        return model.model.layers[0].mlp.gate.weight.detach()

    smoothed, plain = (gate(smoothing, 1.0) - gate(smoothing, 0.0) for smoothing in (0.1, 0.0))
    assert plain.abs().max() > 1e-4
    torch.testing.assert_close(smoothed, plain, rtol=0.0, atol=1e-6)  # differences of weights near 1, in float32


@pytest.mark.parametrize(("family", "counted"), [("olmoe", 7), ("nllb-moe", 8)])
@pytest.mark.parametrize(("processes", "parallel"), [(1, 1), (2, 1), (4, 2)])
def test_the_shares_of_a_step_sum_to_what_trainer_multiplies_its_loss_by(family, counted, processes, parallel):
    """Two micro-batches on each of the processes, of which those of tensor parallelism have the same tokens."""
    trainer = SimpleNamespace(
        model=tiny_model(family), args=SimpleNamespace(average_tokens_across_devices=True),
        get_tp_size=lambda: parallel,
        accelerator=SimpleNamespace(num_processes=processes), model_accepts_loss_kwargs=True, compute_loss_func=None,
    )  # fmt: skip
    num_items = torch.tensor(2 * 3 * counted * processes // parallel)
    labels = _counted_labels(trainer, {"labels": make_ids(3, 8)})
    # Each process has half of its tokens in a micro-batch, and the mean over processes is of the sums of shares.
    assert float(_share_of_step(trainer, labels, num_items)) == pytest.approx(1 / 2)
    assert _counted_labels(trainer, (labels,)) is None


def test_only_trainer_classes_are_accepted():
    for wrong in (make_model(), "DPOTrainer", dict):
        with pytest.raises(ConfigError, match="expected a trainer class"):
            with_router_losses(wrong)
    assert with_router_losses(Trainer).__name__ == "Trainer"


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_synced_reference_gets_the_graphs_too(share, tokenizer, tmp_path):
    policy, reference = (move_graphs(model_for("dpo"), seed=seed) for seed in (0, 1))
    sync = {"sync_ref_model": True, "ref_model_mixup_alpha": share, "ref_model_sync_steps": 2}
    arguments = DPOConfig(output_dir=str(tmp_path), **{**COMMON, "max_steps": 3}, **sync)
    adjacency = reference.model.layers[0].mlp.gate.symphony.adjacency.clone()
    at_step_2 = []

    class Look(SymphonyCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 2:
                at_step_2.append(policy.model.layers[0].mlp.gate.symphony.adjacency.clone())

    DPOTrainer(
        policy, reference, args=arguments, train_dataset=Dataset.from_list(DATA["dpo"]), processing_class=tokenizer,
        callbacks=[Look()],
    ).train()  # fmt: skip
    expected = (1 - share) * adjacency + share * at_step_2[0]
    assert torch.equal(reference.model.layers[0].mlp.gate.symphony.adjacency, expected)


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_learned_graph_is_left_to_trl_which_mixes_parameters(graph):
    policy, reference = (move_graphs(symphonize(make_model(), graph=graph), seed=seed) for seed in (0, 1))
    own, target = (model.model.layers[0].mlp.gate.symphony for model in (policy, reference))
    own.updates.fill_(10)
    before = target.adjacency.detach().clone()
    step = SimpleNamespace(ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)
    mix_graphs(step, SimpleNamespace(global_step=1), policy, reference)
    SyncRefModelCallback._sync_target_model(policy, reference, 0.5)
    torch.testing.assert_close(target.adjacency, 0.5 * before + 0.5 * own.adjacency)
    assert target.updates == 5


@pytest.mark.filterwarnings("ignore")
def test_trainers_that_share_a_callback_sync_their_own_references(tokenizer, tmp_path):
    shared, sync = SymphonyCallback(), {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainers = [
        DPOTrainer(
            model_for("dpo"),
            move_graphs(model_for("dpo")),
            args=DPOConfig(output_dir=str(tmp_path), **COMMON, **sync),
            train_dataset=Dataset.from_list(DATA["dpo"]),
            processing_class=tokenizer,
            callbacks=[shared],
        )
        for _ in range(2)
    ]
    before = [trainer.ref_model.model.layers[0].mlp.gate.symphony.adjacency.clone() for trainer in trainers]
    trainers[1].train()
    after = [trainer.ref_model.model.layers[0].mlp.gate.symphony.adjacency for trainer in trainers]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@pytest.mark.filterwarnings("ignore")
def test_a_synced_reference_without_graphs_is_refused(tokenizer, tmp_path):
    arguments = DPOConfig(output_dir=str(tmp_path), **COMMON, sync_ref_model=True)
    trainer = DPOTrainer(
        model_for("dpo"), make_model(experts="eager"), args=arguments, train_dataset=Dataset.from_list(DATA["dpo"]),
        processing_class=tokenizer, callbacks=[SymphonyCallback()],
    )  # fmt: skip
    with pytest.raises(PatchError, match="symphonize the reference too"):
        trainer.train()


LATE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import symphony_hf
for call in (symphony_hf.symphonize, symphony_hf.expert_graphs, symphony_hf.unsymphonize):
    try:
        call(model)
    except symphony_hf.PatchError as error:
        assert "loaded before `import symphony_hf`" in str(error), error
    else:
        raise SystemExit(f"{call.__name__} took it")
del model.config.symphony
symphony_hf.symphonize(model)
"""


@pytest.mark.thorough
def test_a_checkpoint_that_was_loaded_before_the_import_is_refused(tmp_path, plain_python):
    move_graphs(symphonize(make_model())).save_pretrained(tmp_path / "new")
    write_format_1(tmp_path / "new", tmp_path / "old")  # a later format is refused without the import
    plain_python(LATE, tmp_path / "old")
