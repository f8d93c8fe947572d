"""Adapters in training: by Trainer, resumed, on several ranks; and the table of what is trained."""

import json

import peft
import pytest
import torch
import torch.multiprocessing as mp
from adapted import DECAY, adapted_model, assert_same_graphs, logits
from models import make_ids, make_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from symphony_hf import (
    PatchError,
    SymphonyCallback,
    expert_graphs,
    load_adapter,
    lora_config,
    print_trainable_parameters,
    symphonize,
    trainable_parameters,
)
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.training.trainer import ResumableTrainer

STEPS, CUT = 6, 3


def train(folder, model, resume=None, trainer_class=Trainer, **settings):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(32, 8)]
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        bf16=False,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=CUT,
        learning_rate=0.01,
        **settings,
    )
    trainer = trainer_class(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapted(router, seed=0, **settings):
    weights = {} if router == "train" else {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}
    model = symphonize(make_model(), decay=DECAY, **weights)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora_config(model, r=4, router=router, **settings))


@pytest.mark.thorough
@pytest.mark.parametrize("router", ["graph", "train"])
def test_resumed_by_trainer_it_is_the_uninterrupted_run(tmp_path, router, capsys):
    whole = adapted(router, experts=True)
    train(tmp_path, whole)
    assert "Trainable parameters" in capsys.readouterr().out
    start = expert_graphs(adapted(router))
    assert all(not torch.equal(graph, start[name]) for name, graph in expert_graphs(whole).items())
    resumed = adapted(router, seed=9, experts=True)
    trainer = train(tmp_path, resumed, resume=str(tmp_path / f"checkpoint-{CUT}"))
    assert trainer.state.global_step == STEPS
    state = resumed.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())
    # Each checkpoint has its record, and is loaded by it.
    loaded = load_adapter(make_model(), tmp_path / f"checkpoint-{STEPS}")
    assert_same_graphs(loaded, whole)
    assert torch.equal(logits(loaded), logits(whole))


@pytest.mark.thorough
def test_resumed_by_our_trainer_no_familys_lora_is_lost(tmp_path):
    """PEFT's own loader, with which Trainer resumes, loses the LoRA of DeepSeek-OCR 2."""

    def run(seed, resume=None):
        model = symphonize(tiny_model("deepseek_ocr2"), decay=DECAY, balance_loss_weight=0, z_loss_weight=0)
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, lora_config(model, r=4))
        train(tmp_path, model, resume, trainer_class=ResumableTrainer)
        return model

    whole = run(0)
    state = run(9, str(tmp_path / f"checkpoint-{CUT}")).state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


def test_trainer_gives_a_config_of_the_users_own_a_record(tmp_path):
    model = symphonize(make_model(), decay=DECAY, z_loss_weight=0, balance_loss_weight=0)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["symphony"])
    train(tmp_path, peft.get_peft_model(model, config))
    record = json.loads((tmp_path / f"checkpoint-{CUT}" / "symphony_config.json").read_text())
    assert record["router"] == "graph"


@pytest.mark.filterwarnings("ignore")  # of TRL's imports
def test_trls_trainer_takes_the_config(tmp_path):
    trl = pytest.importorskip("trl")
    from trainers import sft

    model = symphonize(make_model(), decay=DECAY)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    config = lora_config(model, router="train", r=4)
    trainer = sft(trl, model, tmp_path, [SymphonyCallback()], peft_config=config, **settings)
    trainer.train()
    loaded = load_adapter(make_model(), tmp_path / "checkpoint-2")
    assert_same_graphs(loaded, trainer.model)
    assert torch.equal(logits(loaded), logits(trainer.model))


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of TRL's imports
def test_dpo_of_a_trained_adapter_begins_at_its_reference(tmp_path):
    """TRL's reference is a copy of the adapter: before the first step, both give the same log-probabilities."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from trainers import ARGUMENTS, make_tokenizer

    words = [" ".join(map(str, range(start, start + 6))) for start in (10, 20, 30)]
    rows = Dataset.from_dict({"prompt": words[:1] * 2, "chosen": words[1:2] * 2, "rejected": words[2:] * 2})
    model = adapted_model(router="train").train()
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), **{**ARGUMENTS, "max_steps": 1}),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        callbacks=[SymphonyCallback()],
    )
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0


def test_trainer_on_a_base_without_graphs(tmp_path):
    with pytest.raises(PatchError, match="not symphonized"):
        train(tmp_path / "plain", peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])))
    adapted_model().save_pretrained(tmp_path / "adapter")  # which brings its graphs, through PEFT's own loader too
    model = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    before = expert_graphs(model)
    train(tmp_path / "run", model)
    assert all(not torch.equal(graph, before[name]) for name, graph in expert_graphs(model).items())


# Several ranks.


@pytest.mark.slow
def test_ddp_and_zero(tmp_path):
    """On two ranks, graphs are bitwise those of a plain loop over all micro-batches; gradients differ by rounding."""
    pytest.importorskip("deepspeed")
    from adapter_ranks import make_adapted, run
    from loop_ranks import RANKS, assert_same, plain_loop, steps_of

    mp.spawn(run, (tmp_path,), nprocs=RANKS)
    model = make_adapted()
    expected = plain_loop(model, steps_of(1, RANKS))
    assert any("lora_A" in name for name in expected)
    assert any("modules_to_save.default.weight" in name for name in expected)
    for arrangement in ("ddp", "zero2", "zero3"):
        for rank in range(RANKS):
            assert_same(load_file(tmp_path / f"{arrangement}.{rank}.st"), expected)
    loaded = load_adapter(make_model(output_router_logits=True), tmp_path / "ddp")
    assert_same_graphs(loaded, model)
    gathered = load_adapter(make_model(output_router_logits=True), tmp_path / "trainer" / "checkpoint-2")
    graphs = load_file(tmp_path / "trainer" / "graphs.st")
    assert all(torch.equal(a, b) for a, b in zip(expert_graphs(gathered).values(), graphs.values(), strict=True))


# The table.


def counts(model):
    return {count.role: (count.trainable, count.total) for count in trainable_parameters(model)}


def test_the_table_is_counted_by_hand():
    """OLMoE: hidden 32, experts 8 x (48 x 32 + 32 x 24), attention 4 heads of 8 and 2 for keys and values, 3 layers."""
    model = symphonize(make_model())
    attention, experts, router, graph = 32 * 32 * 2 + 16 * 32 * 2, 8 * (48 * 32 + 32 * 24), 8 * 32, 64
    others = 2 * 96 * 32 + 32 + 3 * (2 * 32 + 32 + 16)  # embeddings and head, and the norms
    plain = {"routers": router, "graphs": graph, "experts": experts, "attention": attention}
    assert counts(model) == {role: (3 * n * (role != "graphs"), 3 * n) for role, n in plain.items()} | {
        "others": (others, others)
    }
    adapted = peft.get_peft_model(model, lora_config(model, router="train", experts=True, r=4))
    of_attention = 4 * (64 + 48 + 48 + 64)  # r times what goes in and out of q, k, v and o
    of_experts = 8 * 4 * (32 + 48 + 24 + 32)
    assert counts(adapted) == {
        "routers": (3 * router, 2 * 3 * router),  # the base's own is still there
        "graphs": (0, 2 * 3 * graph),
        "experts": (3 * of_experts, 3 * (experts + of_experts)),
        "attention": (3 * of_attention, 3 * (attention + of_attention)),
        "others": (0, others),
    }
    total = sum(total for _, total in counts(adapted).values()) - 2 * 3 * graph
    assert total == sum(parameter.numel() for parameter in adapted.parameters())


def test_a_learned_graph_is_trained():
    model = symphonize(make_model(), graph="learned")
    adapted = peft.get_peft_model(model, lora_config(model))
    assert counts(adapted)["graphs"] == (3 * 64, 2 * 3 * 64)


def test_the_table_in_print():
    model = symphonize(make_model())
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    console = Console(record=True, width=100)
    print_trainable_parameters(adapted, console)
    text = console.export_text()
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(rows) == {"routers", "graphs", "experts", "attention", "others", "all"}
    assert "100.00%" in rows["attention"]
    assert f"{3 * 4 * 224:,}" in rows["all"]
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    print_trainable_parameters(adapted, console)  # nothing to divide by
