"""A recipe trains, saves and evaluates, in one process and in two."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from models import make_model
from small_runs import RECIPE, recipe_overrides, smoke_overrides
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from visual import entry, write_llava

from symphony_hf import (
    ConfigError,
    DataError,
    RoutingMonitor,
    SymphonyConfig,
    expert_graphs,
    is_symphonized,
    symphonize,
)
from symphony_hf.checkpoints.folder import open_folder
from symphony_hf.checkpoints.model_card import BEGIN, END
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ReportError, SymphonyWarning
from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.recipe import DataSection, ModelSection, OutputSection, Recipe, load_recipe
from symphony_hf.training import final_evaluation, processors, runner
from symphony_hf.training.final_evaluation import measure
from symphony_hf.training.monitor import HISTORY, GraphMonitor, LoadHistory
from symphony_hf.training.routing_monitor import monitors_of
from symphony_hf.training.runner import run_recipe


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Overrides that scale the recipe down to seconds."""
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    return recipe_overrides(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Settings of a run, its folder and its results; change copies."""
    folder = tmp_path_factory.mktemp("first")
    overrides = {**recipe_overrides(folder), "eval.seed": 7}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYMPHONY_HF_CACHE", str(folder / "cache"))
        results = run_recipe(load_recipe(RECIPE, overrides), "the command")
    return overrides, folder / "run", results


def test_a_recipe_runs(first, tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    overrides, run, results = first
    stored = json.loads((run / "results.json").read_text())
    assert stored["test"] == results["test"]
    assert 1 < results["test"]["clean"] < 400
    assert results["test"]["ratio"] == pytest.approx(results["test"]["attacked"] / results["test"]["clean"])
    assert stored["recipe"]["train"]["max_steps"] == 3
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert {int(m.symphony.updates) for m in model.modules() if hasattr(m, "symphony")} == {3}
    assert all(not torch.equal(graph, torch.eye(16) * 2 / 16) for graph in expert_graphs(model).values())
    # And on from the checkpoint, with its graphs; other settings than its own would be a false baseline.
    again = {**overrides, "model.path": str(run / "final"), "model.config": None}
    again["output.directory"] = str(tmp_path / "again")
    with pytest.raises(ConfigError, match=r"saved with other settings \(strength\)"):
        run_recipe(load_recipe(RECIPE, {**again, "symphony.strength": 0.5}))
    run_recipe(load_recipe(RECIPE, again))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "final")
    assert {int(m.symphony.updates) for m in model.modules() if hasattr(m, "symphony")} == {6}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("limit", "loads_best", "model"),
    [(1, True, "the best by validation, `"), (2, False, "after the last step; best by validation: `")],
)
def test_the_best_and_the_last_checkpoint_stay(limit, loads_best, model, small, tmp_path):
    """The learning rate makes the first checkpoint the best. At a limit of one, Trainer alone would delete the last."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    every |= {"save_total_limit": limit, "load_best_model_at_end": loads_best}
    results = run_recipe(load_recipe(RECIPE, {**small, **every, "learning_rate": 10.0}), "again")
    output = tmp_path / "run"
    losses = [entry["eval_loss"] for entry in results["validation"]]
    assert len(losses) == 3
    assert losses[0] == min(losses)
    assert results["best_checkpoint"] == str(output / "checkpoint-1")
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert f"Model: `final/`, {model}checkpoint-1/`." in (output / "report.md").read_text()


def test_the_report_says_what_a_reader_needs_to_run_it_again(first):
    overrides, run, results = first
    page = (run / "report.md").read_text()
    settings = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    recipe = load_recipe(RECIPE, overrides)
    assert settings["train"] == recipe.train
    assert SymphonyConfig.from_dict(settings["symphony"]) == recipe.symphony
    assert "```bash\nthe command\n```" in page
    assert "Seeds: training 0, data 0, evaluation 7." in page
    assert f"revision {results['data']['revision']}." in page
    assert len(results["data"]["revision"]) == 64  # the SHA-256 of what was read
    assert f"| clean | {results['test']['clean']:.4f} |" in page
    assert all(f"{name} {version}" in page for name, version in results["versions"].items())


def test_a_missing_validation_split_is_refused_before_weights_are_loaded(tmp_path, shared_runs, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(shared_runs.root / "cache"))  # its tokenizer takes seconds to train
    monkeypatch.setattr(runner, "load_model", None)  # calling it would raise another error
    smoke = RECIPE.parents[1] / "llava-smoe-4.2b" / "smoke.yaml"
    path = write_llava(tmp_path, [entry(number) for number in range(4)])
    overrides = {"eval_strategy": "steps", "data.path": str(path), "output.directory": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="eval_strategy `steps` needs a validation split"):
        run_recipe(load_recipe(smoke, overrides))


@pytest.mark.thorough
def test_a_stream_trains_its_own_tokenizer(small, tmp_path):
    """On its first documents, without reading all of it."""
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": f"row {n} of {n * 7919} numbers"}) + "\n" for n in range(400)))
    streamed = {**small, "data.path": str(table), "data.streaming": True}
    results = run_recipe(load_recipe(RECIPE, streamed))
    assert results["steps"] == 3
    assert "read while training goes on" in results["data"]["notes"][0]


@pytest.mark.thorough
def test_a_plain_recipe_runs(small, tmp_path):
    """It is watched by RoutingMonitor."""
    recipe = load_recipe(RECIPE, small)
    run_recipe(recipe.__class__(**{**recipe.__dict__, "symphony": None}))
    assert not is_symphonized(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final"))
    assert len(LoadHistory.read(tmp_path / "run" / f"routing_{HISTORY}").steps) > 0
    assert "](routing_graphs.png)" in (tmp_path / "run" / "report.md").read_text()


def test_each_kind_of_model_has_its_monitor():
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    models = (symphonize(make_model()), make_model(), dense)
    assert [[type(monitor) for monitor in monitors_of(model)] for model in models] == [
        [GraphMonitor],
        [RoutingMonitor],
        [],
    ]


CHAT = RECIPE.parents[1] / "olmoe-7b-sft" / "smoke.yaml"


@pytest.mark.thorough
def test_a_stock_model_trains_with_adapters(tmp_path, shared_runs, monkeypatch):
    """It is watched by RoutingMonitor, and its adapter is a plain one."""
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(shared_runs.root / "cache"))  # its tokenizer takes seconds to train
    recipe = dataclasses.replace(load_recipe(CHAT, smoke_overrides(tmp_path)), symphony=None)
    results = run_recipe(recipe)
    assert 0 < results["parameters"]["trained"] < results["parameters"]["total"]
    assert (tmp_path / "run" / "routing_graphs.png").exists()
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "final" / "symphony_config.json").exists()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([Document("a", "What is it? It is a number, or none.")], 300).save_pretrained(folder)
    return str(folder)


@pytest.mark.thorough
def test_prompts_are_not_learned_or_measured_unless_asked_for(tokenizer_folder, tmp_path):
    """The prompts are the same in all rows and the completions are not, so their losses differ."""
    table = tmp_path / "rows.jsonl"
    rows = [{"prompt": "What is it? " * 3, "completion": f" {n * 7919}"} for n in range(60)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "model.tokenizer": tokenizer_folder,
        "data.path": str(table),
        "data.packing": True,
        "data.block_size": 64,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    losses, notes = {}, {}
    for name in (None, False):
        output = {"output.directory": str(tmp_path / str(name))}
        given = {} if name is None else {"completion_only_loss": name}
        results = run_recipe(load_recipe(CHAT, {**shared, **output, **given}))
        losses[name] = (results["validation"][0]["eval_loss"], results["test"]["loss"])
        notes[name] = results["data"]["notes"][-1]
    assert all(learned != everything for learned, everything in zip(losses[None], losses[False], strict=True))
    assert notes[None].endswith("rows of `prompt` and `completion` (text); loss on completions only")
    assert notes[False].endswith("loss on all tokens")


def test_a_training_argument_without_effect_is_refused_before_weights(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", None)  # calling it would raise another error
    overrides = {
        "model.tokenizer": tokenizer_folder,
        "completion_only_loss": True,
        "output.directory": str(tmp_path / "run"),
    }
    with pytest.raises(ConfigError, match="`completion_only_loss: true` has no effect"):
        run_recipe(load_recipe(CHAT, overrides))
    with pytest.raises(ConfigError, match=r"eval: `documents: 5` has no effect on data of kind `chat`"):
        load_recipe(CHAT, {"eval.documents": 5})
    with pytest.raises(ConfigError, match=r"data: `text_column` has no effect on data of kind `glue`"):
        load_recipe(CHAT, {"data.kind": "glue", "data.name": "qnli", "data.text_column": "body"})
    with pytest.raises(ConfigError, match="`trainable` has no effect with `peft`"):
        load_recipe(RECIPE, {"model.trainable": ["*"], "peft.r": 4})


def test_bad_settings_and_data_are_refused_before_training(small, tmp_path):
    with pytest.raises(ConfigError, match="did you mean `learning_rate`"):
        run_recipe(load_recipe(RECIPE, {**small, "learning_rat": 1}))
    with pytest.raises(ConfigError, match="train:"):
        run_recipe(load_recipe(RECIPE, {**small, "lr_scheduler_type": "cosin"}))
    with pytest.raises(DataError):
        run_recipe(load_recipe(RECIPE, {**small, "data.path": str(tmp_path / "nothing.txt")}))
    with pytest.raises(DataError, match="block"):
        run_recipe(load_recipe(RECIPE, {**small, "data.block_size": 100_000}))
    assert not (tmp_path / "run" / "final").exists()


LAUNCHERS = {
    "accelerate": "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no",
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "world_size"), [("accelerate", 1), ("torchrun", 2)])
def test_launchers(launcher, world_size, small, tmp_path):
    """accelerate's launcher starts a single process on a CPU; torchrun starts two."""
    overrides = [word for name, value in small.items() for word in (f"--{name}", json.dumps(value))]
    result = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher].split(), "-m", "symphony_hf.train", str(RECIPE), *overrides],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == world_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert all(not torch.equal(graph, torch.eye(16) * 2 / 16) for graph in expert_graphs(model).values())


@pytest.mark.thorough
def test_a_run_in_a_used_folder_does_not_keep_the_numbers_of_another_model(small, tmp_path, monkeypatch):
    """The run is killed after its model is saved, before it is evaluated."""

    def killed(*arguments):
        raise KeyboardInterrupt

    output = tmp_path / "run"
    output.mkdir()
    (output / "results.json").write_text('{"versions": {"symphony_hf": "0.1.0"}}')
    (output / "report.md").write_text("of an earlier run")
    (output / "final").mkdir()
    (output / "final" / "README.md").write_text(f"---\nlibrary_name: symphony_hf\n---\n\n{BEGIN}\n\n# Model\n\n{END}\n")
    (output / "final" / "graphs.png").write_text("of an earlier run")
    (output / "final" / "notes.md").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load_recipe(RECIPE, small))
    for name in ("results.json", "final/README.md", "final/graphs.png"):
        assert (output / name).exists()  # until then it is of the model that is there
    monkeypatch.setattr(runner, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(RECIPE, small))
    assert (output / "final" / "config.json").exists()
    assert (output / "final" / "notes.md").exists()
    for name in ("report.md", "final/README.md", "final/graphs.png"):
        assert not (output / name).exists()
    with pytest.raises(ReportError, match="a training run without results: continue it with --resume_from_checkpoint"):
        read_runs([output])
    assert open_folder(output / "final").results is None


@pytest.mark.thorough
def test_a_plain_run_in_a_used_folder_does_not_keep_the_card_of_another_model(first, small, tmp_path):
    """A card that somebody has added to stays."""
    final = shutil.copytree(first[1], tmp_path / "run") / "final"
    assert (final / "README.md").exists()
    plain = dataclasses.replace(load_recipe(RECIPE, small), symphony=None)
    card = (final / "README.md").read_text()
    run_recipe(plain)
    assert not (final / "README.md").exists()
    assert not (final / "graphs.png").exists()
    (final / "README.md").write_text(f"{card}\nMy notes.")
    run_recipe(plain)
    assert (final / "README.md").read_text().endswith("My notes.")


class Diverged:
    """A trainer whose model has a loss of 1,000. exp(710) is more than a float holds."""

    def token_loss(self, rows, split):
        return 1000.0


def test_a_diverged_model_has_an_infinite_perplexity():
    data = SimpleNamespace(documents=None, test=[[3, 4, 5]], kind="chat", collator=None)
    assert measure(None, Diverged(), None, data) == {"split": "test", "loss": 1000.0, "perplexity": float("inf")}


def test_packing_that_is_not_checked_is_said(monkeypatch):
    monkeypatch.setattr(runner, "expected_strategy", lambda arguments: "zero3")
    monkeypatch.setattr(runner, "check_packing", None)  # it could not run on weights that are partitioned
    with pytest.warns(SymphonyWarning, match="under ZeRO-3, .* not checked that OlmoeForCausalLM keeps"):
        runner._check_packing(make_model("olmoe"), None, SimpleNamespace(process_index=0))
    runner._check_packing(make_model("olmoe"), None, SimpleNamespace(process_index=1))


@pytest.mark.parametrize(
    ("kind", "train", "evaluation", "rows"),
    [("chat", 4, 4, 1), ("text", 1, 1, 1), ("text", 8, 1, 2), ("text", 1, 8, 2)],
)
def test_packing_is_checked_in_batches_of_several_rows_if_there_are_any(
    kind, train, evaluation, rows, tmp_path, monkeypatch
):
    """TRL makes one row of a batch of conversations."""
    checked = []
    monkeypatch.setattr(runner, "check_packing", lambda model, attention, rows=2: checked.append((attention, rows)))
    sizes = {"per_device_train_batch_size": train, "per_device_eval_batch_size": evaluation}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", eval_strategy="epoch", **sizes)
    recipe = SimpleNamespace(data=SimpleNamespace(kind=kind), model=SimpleNamespace(attention="flash_attention_2"))
    runner._check_packing(None, recipe, arguments)
    assert checked == [("flash_attention_2", rows)]


def test_a_limit_of_documents_takes_some_from_all_over(monkeypatch):
    monkeypatch.setattr(final_evaluation, "evaluate_documents", lambda model, processor, documents, *rest: documents)
    section = SimpleNamespace(eval=SimpleNamespace(documents=3), data=SimpleNamespace(block_size=8))
    trainer = SimpleNamespace(model=None, args=SimpleNamespace(eval_batch_size=1))
    assert measure(section, trainer, None, SimpleNamespace(documents=list("abcdef"))) == ["a", "c", "e"]


def test_the_revision_is_of_the_models_own_tokenizer(monkeypatch):
    """Not of another repository's, with or without images."""
    asked = []
    loader = SimpleNamespace(from_pretrained=lambda source, **how: asked.append((source, how.get("revision"))))
    for name in ("AutoTokenizer", "AutoImageProcessor"):
        monkeypatch.setattr(processors, name, loader)
    for name in ("vision_config_of", "select_strategy", "_processor"):
        monkeypatch.setattr(processors, name, lambda *parts: None)
    model = {"path": "a/model", "revision": "v1", "config": None}
    for more in ({}, {"vision": "a/vision"}):
        for tokenizer in (None, "a/tokenizer"):
            section = dataclasses.replace(load_recipe(RECIPE).model, **model, **more, tokenizer=tokenizer)
            processors.load_processor(dataclasses.replace(load_recipe(RECIPE), model=section))
    texts = [found for found in asked if found[0] != "a/vision"]
    assert texts == [("a/model", "v1"), ("a/tokenizer", None)] * 2


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    """Transformers builds an empty one. The checkpoints of a run have none, and its `final/` has."""
    make_model("olmoe").save_pretrained(tmp_path)
    for model in ({"path": str(tmp_path)}, {"path": "a/model", "tokenizer": str(tmp_path)}):
        section = dataclasses.replace(load_recipe(RECIPE).model, config=None, **model)
        with pytest.raises(ConfigError, match=r"its files are missing; set `model.tokenizer` to a checkpoint"):
            processors.load_processor(dataclasses.replace(load_recipe(RECIPE), model=section))


@pytest.mark.parametrize(
    ("model", "source"),
    [({"path": "a/model"}, "path"), ({"config": {"model_type": "olmoe"}, "tokenizer": "a/model"}, "tokenizer")],
)
def test_settings_of_a_trained_tokenizer_are_noted_where_another_one_is_used(model, source, tmp_path, monkeypatch):
    recipe = Recipe(model=ModelSection(**model), data=DataSection(vocab_size=999, tokenizer="words"))
    assert processors.tokenizer_notes(recipe) == [
        f"data: `{name}` has no effect: the tokenizer is that of `model.{source}`"
        for name in ("vocab_size: 999", "tokenizer: words")
    ]
    assert processors.tokenizer_notes(dataclasses.replace(recipe, data=DataSection())) == []
    assert processors.tokenizer_notes(load_recipe(RECIPE)) == []
    # The run prints them before it loads anything.
    printed = []
    monkeypatch.setattr(runner, "print_notes", lambda arguments, notes: printed.extend(notes))
    monkeypatch.setattr(runner, "load_processor", None)  # calling it ends the run
    recipe = dataclasses.replace(recipe, train={"use_cpu": True}, output=OutputSection(directory=str(tmp_path / "run")))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        run_recipe(recipe)
    assert printed == processors.tokenizer_notes(recipe)


def test_one_process_reads_the_text_of_the_tokenizer_first(small, monkeypatch):
    """The others find what it read in the cache."""
    inside = []

    @contextlib.contextmanager
    def first(arguments, local=True, desc="work"):
        inside.append(desc)
        yield
        inside.pop()

    class Reached(Exception):
        pass

    def load(recipe):
        raise Reached(*inside)

    monkeypatch.setattr(TrainingArguments, "main_process_first", first)
    monkeypatch.setattr(runner, "load_processor", load)
    with pytest.raises(Reached, match=r"^reading the data$"):
        run_recipe(load_recipe(RECIPE, small))


@pytest.mark.parametrize("name", ["results.json", "report.md"])
def test_files_that_no_run_wrote_are_not_replaced(name, small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"versions": {"numpy": "2.0"}}')
    with pytest.raises(ConfigError, match=f"has `{name}`, which no run of symphony_hf wrote"):
        run_recipe(load_recipe(RECIPE, small))
    assert (tmp_path / "run" / name).exists()
