"""Trainers on the CPU, transformers' and TRL's, with few and quiet settings."""

import torch
from loop_ranks import LR, STEPS
from models import make_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

ROWS = [make_ids(1, length, seed=seed)[0].tolist() for seed, length in enumerate([8, 5, 7, 8, 6, 8, 4, 8, 8, 8, 3, 8])]
ARGUMENTS = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "save_strategy": "no",
    "logging_steps": 1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": LR,
    "max_grad_norm": 0.0,
    "bf16": False,
}


WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(str, range(92))])}


def make_tokenizer():
    """A tokenizer of numbers, with the vocabulary of the tiny models."""
    raw = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model, rows, tmp_path, callbacks=(), eval_dataset=None, resume=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 3, "seed": 0, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**defaults, **settings},
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(rows), eval_dataset=eval_dataset, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tiny_tokenizer():
    """Return a tokenizer of the tiny models' 96 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(models.WordLevel(special | {f"w{i}": i for i in range(3, 96)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sft(trl, model, tmp_path, callbacks, rows=ROWS, **settings):
    """Return TRL's SFTTrainer on rows of tokens."""
    from datasets import Dataset

    peft_config = settings.pop("peft_config", None)
    arguments = trl.SFTConfig(str(tmp_path), **{**ARGUMENTS, **settings})
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )
