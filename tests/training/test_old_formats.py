"""Files of format 1, written here as the first releases wrote them: they load, and an old run resumes."""

import json

import pytest
import torch
from models import make_ids, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

from symphony_hf import SymphonyCallback, expert_graphs, load_adapter, symphonize
from symphony_hf.training.monitor import GraphMonitor
from symphony_hf.training.resuming import checkpoint_to_resume
from symphony_hf.training.trainer import ResumableTrainer

ROUTER = "model.layers.0.mlp.gate"
SETTINGS = {
    "format": 1,
    "graph": "ema",
    "strength": 1.0,
    "smoothing": "logits",
    "normalization": "row",
    "self_loops": True,
    "decay": 0.99,
    "warmup_steps": 0,
    "balance_loss_weight": 0.01,
    "balance_scope": "local",
    "z_loss_weight": 0.001,
    "layers": None,
    "routers": None,
    "top_k": None,
}
LOG = {"epoch": 0.25, "grad_norm": 2.25, "learning_rate": 5e-05, "loss": 4.61, "step": 1, "symphony/balance_loss": 4.13}
LOG |= {"symphony/z_loss": 19.67, "symphony/busiest": 1.0, "symphony/dead_experts": 0.0, "symphony/drift": 0.01}
CONTROL = dict.fromkeys(("should_epoch_stop", "should_evaluate", "should_log", "should_training_stop"), False)
STATE = {
    "best_global_step": None,
    "best_metric": None,
    "best_model_checkpoint": None,
    "epoch": 0.5,
    "eval_steps": 500,
    "global_step": 2,
    "is_hyper_param_search": False,
    "is_local_process_zero": True,
    "is_world_process_zero": True,
    "log_history": [LOG, LOG | {"epoch": 0.5, "step": 2}],
    "logging_steps": 1,
    "max_steps": 4,
    "num_input_tokens_seen": 0,
    "num_train_epochs": 1,
    "save_steps": 2,
    "stateful_callbacks": {"TrainerControl": {"args": CONTROL | {"should_save": True}, "attributes": {}}},
    "total_flos": 4795392.0,
    "train_batch_size": 2,
    "trial_name": None,
    "trial_params": None,
}


def base():
    return make_model(num_hidden_layers=1)


def graph():
    random = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    return random + random.T + 8 * torch.eye(8)


def graph_tensors(prefix=""):
    return {f"{prefix}{ROUTER}.symphony.adjacency": graph(), f"{prefix}{ROUTER}.symphony.updates": torch.tensor(5)}


def smoothed(model):
    """The same model with its graph folded in, by the definition: the router's weight is P W."""
    with torch.no_grad():
        weight = model.model.layers[0].mlp.gate.weight
        weight.copy_(graph() / graph().sum(1, keepdim=True) @ weight)
    return model


def write_checkpoint(folder, **settings):
    """The stock model's own files, with the graph beside its weights and the settings in its config."""
    base().save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | graph_tensors(), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["SymphonyOlmoeForCausalLM"], "symphony": SETTINGS | settings}
    (folder / "config.json").write_text(json.dumps(config))


def write_run(output):
    """A run that was killed after its checkpoint of step 2, which has the model's own tensor names."""
    folder = output / "checkpoint-2"
    write_checkpoint(folder)
    save_file(dict(base().state_dict()) | graph_tensors(), folder / "model.safetensors", {"format": "pt"})
    (folder / "trainer_state.json").write_text(json.dumps(STATE))
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    record = {"files": files, "order": 1, "processes": 1, "settings": {"seed": 42}, "step": 2}
    (folder / "symphony_checkpoint.json").write_text(json.dumps(record))
    loads = {f"load/{ROUTER}": torch.full((3, 8), 0.125), "steps": torch.tensor([1, 2, 3])}  # step 3 was not saved
    save_file(loads, output / "load_history.safetensors")


def write_adapter(folder):
    """LoRA on one projection, with the graph. Returns what LoRA adds to the projection's weight."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    config |= {
        "target_modules": ["q_proj"],
        "modules_to_save": ["symphony"],
        "symphony": SETTINGS,
        "inference_mode": True,
    }
    config |= {"base_model_name_or_path": None, "peft_version": "0.21.2", "target_parameters": [], "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    record = {"base_model": None, "format": 1, "model_type": "olmoe", "router": "graph", "symphony": SETTINGS}
    record["routers"] = {ROUTER: {"num_experts": 8, "top_k": 3}}
    (folder / "symphony_config.json").write_text(json.dumps(record))
    down, up = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), torch.full((32, 2), 0.1)
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{lora}A.weight": down, f"{lora}B.weight": up, **graph_tensors("base_model.model.")}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return 4 / 2 * up @ down


@pytest.mark.parametrize("kind", ["ema", "learned"])
def test_a_checkpoint_loads(kind, tmp_path):
    write_checkpoint(tmp_path / "old", graph=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert torch.equal(expert_graphs(model)[ROUTER], graph())
    assert model.model.layers[0].mlp.gate.symphony.updates == 5
    assert isinstance(model.model.layers[0].mlp.gate.symphony.adjacency, torch.nn.Parameter) == (kind == "learned")
    ids = make_ids()
    torch.testing.assert_close(model(ids).logits, smoothed(base())(ids).logits)


def test_an_adapter_loads(tmp_path):
    added = write_adapter(tmp_path / "old")
    adapted, expected = load_adapter(base(), tmp_path / "old"), smoothed(base())
    with torch.no_grad():
        expected.model.layers[0].self_attn.q_proj.weight.add_(added)
    ids = make_ids()
    torch.testing.assert_close(adapted(ids).logits, expected(ids).logits)


def test_a_run_resumes(tmp_path):
    write_run(tmp_path)
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 8)]
    model = symphonize(base())
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=4, save_steps=2, logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, per_device_train_batch_size=2, resume_from_checkpoint=True,
    )  # fmt: skip
    callbacks = [SymphonyCallback(), GraphMonitor(pictures=False)]
    trainer = ResumableTrainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(checkpoint_to_resume(arguments)))
    assert trainer.state.log_history[0] == LOG
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert model.model.layers[0].mlp.gate.symphony.updates == 7
    learned = expert_graphs(model)[ROUTER]
    assert 0.9 * graph().sum() < learned.sum() < graph().sum()  # two steps of the old graph's moving average
    history = load_file(tmp_path / "load_history.safetensors")
    assert history["steps"].tolist() == [1, 2, 3, 4]
    assert torch.equal(history[f"load/{ROUTER}"][:2], torch.full((2, 8), 0.125))
    record = json.loads((tmp_path / "checkpoint-4" / "symphony_checkpoint.json").read_text())
    assert (record["step"], record["order"]) == (4, 2)
