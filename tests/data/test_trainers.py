"""Every kind of data in the Trainer that it is for: two steps, and an evaluation where there is a held-out split."""

import json

import pytest
import torch
from models import make_model as make_text_model
from transformers import Trainer, TrainingArguments
from visual import entry, make_model, make_processor, write_llava

from symphony_hf import SymphonyCallback, expert_graphs, symphonize
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.recipe import DataSection

ROWS = [f"Row {number} has some text of its own, and a little more: {number * 7919}." for number in range(300)]
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def own_tokenizer(small):
    return train_tokenizer(small.train, 300)


def run(model, prepared, folder, **settings):
    model = symphonize(model)
    start = expert_graphs(model)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **SETTINGS, **settings),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        data_collator=prepared.collator,
        callbacks=[SymphonyCallback()],
    )
    trainer.train()
    check(trainer, model, start)
    return trainer


def check(trainer, model, start):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.tensor(losses).isfinite())
    assert all(not torch.equal(graph, start[name]) for name, graph in expert_graphs(model).items())
    if trainer.eval_dataset is not None:
        assert 0 < trainer.evaluate()["eval_loss"] < 20


@pytest.mark.thorough
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_text(table, own_tokenizer, tmp_path, streaming, packing):
    section = DataSection(path=table, block_size=16, streaming=streaming, packing=packing)
    prepared = prepare_data(section, own_tokenizer, seed=0)
    trainer = run(make_text_model(vocab_size=len(own_tokenizer)), prepared, tmp_path / "out")
    assert not trainer.model.config.use_cache  # with a cache, packed documents would attend to each other


def test_glue(own_tokenizer, tmp_path):
    prepared = prepare_data(DataSection(kind="glue", name="qnli", path="embedded", limit=8), own_tokenizer, seed=0)
    run(make_text_model(vocab_size=len(own_tokenizer)), prepared, tmp_path / "out")


@pytest.mark.thorough
@pytest.mark.parametrize("remove_unused_columns", [False, True])
def test_llava(tokenizer, tmp_path, remove_unused_columns):
    processor = make_processor(tokenizer)
    entries = [entry(number, images=number // 4) for number in range(8)]
    prepared = prepare_data(DataSection(kind="llava", path=str(write_llava(tmp_path, entries))), processor, seed=0)
    run(
        make_model(processor),
        prepared,
        tmp_path / "out",
        remove_unused_columns=remove_unused_columns,
        dataloader_num_workers=1,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("packing", [False, True])
def test_chat(own_tokenizer, tmp_path, packing):
    from trl import SFTConfig, SFTTrainer

    prepared = prepare_data(DataSection(kind="chat", limit=24), own_tokenizer, seed=0)
    model = symphonize(make_text_model(vocab_size=len(own_tokenizer), max_position_embeddings=512))
    start = expert_graphs(model)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_length=256, packing=packing, assistant_only_loss=True, bf16=False, **SETTINGS
        ),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=own_tokenizer,
        callbacks=[SymphonyCallback()],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == packing
    assert not packing or "attention_mask" not in batch  # with one, packed conversations would attend to each other
    learned = own_tokenizer.decode([label for label in batch["labels"][0].tolist() if label != -100])
    assert "What does" not in learned
    num_conversations = int((batch["position_ids"][0] == 0).sum()) if packing else 1
    assert learned.count("<|endoftext|>") == num_conversations
    trainer.train()
    check(trainer, model, start)
