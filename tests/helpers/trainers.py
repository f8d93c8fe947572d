"""A Trainer on the CPU, with few and quiet settings."""

import torch
from transformers import Trainer, TrainingArguments


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
