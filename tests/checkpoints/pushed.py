"""Looking at what a push left, and runs to push."""

import json

import torch
from huggingface_hub import ModelCard


def card_of(hub, repo_id="me/it", revision="main"):
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def make_run(tmp_path, trained, /, **recipe):
    """What the runner leaves."""
    run = tmp_path / "run"
    trained.save_pretrained(run / "final")
    torch.save({"learning_rate": 1}, run / "final" / "training_args.bin")
    results = {
        "recipe": {"model": {"path": None}, "data": {"path": None}, **recipe},
        "test": {"clean": 10.0, "attacked": 25.0, "ratio": 2.5, "documents": 7, "tokens": 99},
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "checkpoint-3").mkdir(exist_ok=True)
    return run
