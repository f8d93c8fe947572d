"""Trainers that compute their own loss: the router losses reach the routers in one line, and references keep up."""

import copy
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from models import make_ids, make_model, move_graphs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from symphony_hf import ConfigError, PatchError, SymphonyCallback, symphonize, with_router_losses

WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(92))])}
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
}
DATA = {
    "dpo": [{"prompt": f"{i} ", "chosen": f"{i} 3", "rejected": "9"} for i in NUMBERS],
    "kto": [{"prompt": f"{i} ", "completion": f"{i} 3", "label": int(i) % 2 == 0} for i in NUMBERS],
    "reward": [{"chosen": f"{i} 3 4", "rejected": f"{i} 9"} for i in NUMBERS],
    "sft": [{"text": f"{i} 3 4 5"} for i in NUMBERS],
    "grpo": [{"prompt": f"{i} "} for i in NUMBERS],
}
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "sft": (SFTTrainer, SFTConfig, {"loss_type": "dft"}),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 4}),
}


@pytest.fixture
def tokenizer():
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_for(kind, **settings):
    model = make_model("olmoe" if kind != "reward" else "mixtral", experts="eager")
    if kind == "reward":
        torch.manual_seed(0)
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, experts_implementation="eager")
    return symphonize(model, **{"decay": 0.5, **settings})


def trained(kind, wrap, tokenizer, tmp_path, **settings):
    """Train one step. Returns (weight of the first router, what was logged)."""
    trainer_class, config_class, extra = TRAINERS[kind]
    model = model_for(kind, **settings)
    arguments = config_class(output_dir=str(tmp_path / "out"), **COMMON, **extra)
    more = {}
    if kind == "grpo":
        more["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    if kind in ("dpo", "kto"):
        more["ref_model"] = model_for(kind, **settings)
    trainer = (with_router_losses(trainer_class) if wrap else trainer_class)(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(DATA[kind]),
        processing_class=tokenizer,
        callbacks=[SymphonyCallback()],
        **more,
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("symphony/")}
    return next(p for name, p in model.named_parameters() if name.endswith("gate.weight")).detach(), logged


@pytest.mark.parametrize("kind", sorted(TRAINERS))
@pytest.mark.filterwarnings("ignore")
def test_one_line_brings_the_router_losses(kind, tokenizer, tmp_path):
    """With it the balance loss moves the routers otherwise than without; and only then it is logged."""
    weights = {"balance_loss_weight": 50.0, "z_loss_weight": 0.0}
    without, unlogged = trained(kind, False, tokenizer, tmp_path, **weights)
    with_losses, logged = trained(kind, True, tokenizer, tmp_path, **weights)
    assert not torch.equal(with_losses, without)
    assert not unlogged
    assert logged == {"symphony/balance_loss", "symphony/z_loss"}
    # Nearly none, not none: at 0 the model's own aux loss would be in force.
    off, _ = trained(kind, True, tokenizer, tmp_path, balance_loss_weight=1e-30, z_loss_weight=0.0)
    torch.testing.assert_close(off, without)


def test_label_smoothing_gets_them_and_plain_trainer_gets_them_once(tmp_path):
    """Trainer takes the labels away from the model to smooth them."""
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


def test_what_is_no_trainer_class_is_refused():
    for wrong in (make_model(), "DPOTrainer", dict):
        with pytest.raises(ConfigError, match="expected a trainer class"):
            with_router_losses(wrong)
    assert with_router_losses(Trainer).__name__ == "Trainer"


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


def test_a_checkpoint_that_was_loaded_before_the_import_is_refused(tmp_path):
    move_graphs(symphonize(make_model())).save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", LATE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
