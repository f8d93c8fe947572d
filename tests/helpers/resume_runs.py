"""What the tests of resuming run in processes of their own: a small recipe, killed where the test says."""

import contextlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pictures import save_point
from safetensors.torch import load_file

from symphony_hf.train import main
from symphony_hf.training.runner import run_recipe  # noqa: F401  so that a forked process has it imported

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "config.yaml"
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
TIMES = ("runtime", "per_second")

MODELS = {
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def write_text(folder):
    """A corpus of so few lines that a run sees each of them several times."""
    folder.mkdir()
    for number in range(20):
        lines = [f"word{n % 17} is thing{n * 7 % 13} of place{n * 5 % 11}" for n in range(number * 3, number * 3 + 4)]
        (folder / f"{number}.txt").write_text("\n".join(lines))


def settings(root, name, family="olmoe", **more):
    """Overrides that make the recipe's run one of two seconds, several epochs and several checkpoints."""
    values = {
        "data.path": str(root / "text"),
        "data.vocab_size": 300,
        "data.block_size": 16,
        "model.config": {
            "model_type": family,
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "attention_dropout": 0.1,  # so that the random numbers matter
            **MODELS[family],
        },
        "symphony.decay": 0.9,
        "max_steps": 14,
        "warmup_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "eval.documents": 2,
        "output.directory": str(root / name),
    }
    return values | more


def words(values, recipe=RECIPE):
    """The values as a command line has them."""
    return [str(recipe), *(word for name, value in values.items() for word in (f"--{name}", json.dumps(value)))]


def run(values, log, recipe=RECIPE, environment=None, kill_at=None, file_limit=None):
    """Run the recipe in this process, whose output goes to `log`; kill it before one of its file operations.

    Args:
        environment: What a launcher would set.
        kill_at: The number of the operation; 0 only counts them, into `log` with `.events` added.
        file_limit: Bytes that no file may grow beyond, as on a full disk.
    """
    os.environ.update({"SYMPHONY_HF_CACHE": str(Path(values["data.path"]).parent / "cache"), **(environment or {})})
    torch.set_num_threads(1)
    Figure.savefig = save_point
    with open(log, "w", buffering=1) as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        warnings.simplefilter("ignore")
        if kill_at is not None:
            _kill_before_operation(kill_at, values["output.directory"], log)
        if file_limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        code = main(words(values, recipe))
    os._exit(code)  # as it is: nothing at the exit of a forked process may take part


def _kill_before_operation(number, folder, log):
    count = 0

    def note(event, arguments):
        nonlocal count
        if event not in EVENTS or not str(arguments[0]).startswith(f"{folder}/"):
            return
        count += 1
        if number == 0:
            with open(f"{log}.events", "a") as events:
                events.write(f"{event} {arguments[0]}\n")
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Path(f"{log}.events").unlink(missing_ok=True)
    sys.addaudithook(note)


def outcome(folder):
    """All that a run left: what it logged, its weights and graphs, its results; without the times."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    return {
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        "history": [_without_times(entry) for entry in state["log_history"]],
        "best": Path(state["best_model_checkpoint"]).name if state["best_model_checkpoint"] else None,
        "step": state["global_step"],
        "train_loss": results["train"]["train_loss"],
        "test": results["test"],
        "last": load_file(last / "model.safetensors"),
        "final": load_file(folder / "final" / "model.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True) if (last / "optimizer.pt").exists() else None,
    }


def _without_times(entry):
    return {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
