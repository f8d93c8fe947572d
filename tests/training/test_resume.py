"""A run that is killed at any moment resumes exactly from its last complete checkpoint."""

import contextlib
import inspect
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from models import make_ids, make_model
from resume_runs import RECIPE, outcome, run, settings, words, write_text
from safetensors.torch import load_file
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from symphony_hf import CheckpointError, ConfigError, SymphonyCallback, symphonize
from symphony_hf.compat import PRIVATE_NAMES
from symphony_hf.data.prepared import PreparedData
from symphony_hf.files import UNFINISHED
from symphony_hf.recipe import DataSection, ModelSection, PeftSection, Recipe, load_recipe
from symphony_hf.training import resumed_settings, resuming
from symphony_hf.training import trainer as trainer_module
from symphony_hf.training import trainer_checkpoints as checkpoints
from symphony_hf.training.fit import train
from symphony_hf.training.models import add_adapters
from symphony_hf.training.report import _lines as report_lines
from symphony_hf.training.report import describe_run
from symphony_hf.training.resuming import checkpoint_to_resume
from symphony_hf.training.runner import run_recipe
from symphony_hf.training.trainer import ResumableTrainer
from symphony_hf.training.trainer_checkpoints import RECORD

TESTS = Path(__file__).parents[1] / "helpers"


def assert_equal(found, expected, where="run"):
    """Compare nested values, with tensors bit for bit."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_equal(found[place], value, f"{where}.{place}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def steps_of(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


# Folders: fast, with files of a few bytes.


class Killed(BaseException):
    """Stands for a kill of the process: nothing catches it."""


def write_checkpoint(output, step):
    """Save a checkpoint as the Trainer does: write it, finish it, and delete the oldest."""
    target = output / f"checkpoint-{step}"
    written = checkpoints.place_to_write(target)
    (written / "inner").mkdir(parents=True)
    (written / "inner" / "weights").write_bytes(b"w" * step)
    checkpoints.write_json(written / "trainer_state.json", {"global_step": step})
    checkpoints.finish_checkpoint(target, step, batches={})
    checkpoints.delete_oldest(output, 1, {target})


@contextlib.contextmanager
def killed_at(monkeypatch, number):
    """Simulate a kill before the given change to the file system."""
    changes = []
    with monkeypatch.context() as patch:
        for name in ("replace", "mkdir", "rmdir", "unlink", "fsync"):
            original = getattr(os, name)

            def change(*arguments, original=original, **kwargs):
                changes.append(arguments)
                if len(changes) == number:
                    raise Killed
                return original(*arguments, **kwargs)

            patch.setattr(os, name, change)
        with contextlib.suppress(Killed):
            yield changes


@pytest.mark.thorough
@pytest.mark.parametrize("steps", [(2, 4), (4, 4), (9, 4)], ids=["newer", "again", "of a run that began anew"])
def test_a_killed_save_leaves_a_complete_checkpoint(steps, monkeypatch, tmp_path):
    """At each change to the file system. The limit is one checkpoint, so the save also deletes the older one."""
    number, finished = 0, False
    while not finished:
        number += 1
        output = tmp_path / str(number)
        write_checkpoint(output, steps[0])
        finished = True
        with killed_at(monkeypatch, number) as changes:
            write_checkpoint(output, steps[1])
        finished = len(changes) < number
        checkpoints.clear_leftovers(output)
        assert not (output / UNFINISHED).exists()
        found, _ = checkpoints.find_checkpoint(output, True)
        assert found is not None, f"nothing left at change {number}"
        for folder in output.glob("checkpoint-*"):
            assert (folder / "inner" / "weights").read_bytes() == b"w" * int(folder.name.rpartition("-")[2])
        assert found.name == f"checkpoint-{steps[1]}" or (output / f"checkpoint-{steps[0]}").exists()
    assert number > 15
    assert found.name == f"checkpoint-{steps[1]}"
    assert len(list(output.iterdir())) == 1


def test_the_oldest_is_what_was_written_first(tmp_path):
    for step in (20, 3, 6):
        target = tmp_path / f"checkpoint-{step}"
        checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": step})
        checkpoints.finish_checkpoint(target, step, batches={})
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert checkpoints.find_checkpoint(tmp_path, True)[0] == tmp_path / "checkpoint-6"
    checkpoints.delete_oldest(tmp_path, 1, {tmp_path / "checkpoint-6", tmp_path / "checkpoint-20"})
    assert steps_of_ours(tmp_path) == [6, 20]
    checkpoints.delete_oldest(tmp_path, None, set())
    checkpoints.delete_oldest(tmp_path, 1, {tmp_path / "checkpoint-6"})
    assert steps_of_ours(tmp_path) == [6]
    assert (tmp_path / "checkpoint-of-mine").exists()


def test_a_run_deletes_only_its_own_checkpoints(tmp_path):
    """A run that begins anew keeps those that were there, and so does the run that resumes it after a kill."""
    for step in (20, 30):
        checkpoints.write_json(checkpoints.place_to_write(tmp_path / f"checkpoint-{step}") / "trainer_state.json", {})
        checkpoints.finish_checkpoint(tmp_path / f"checkpoint-{step}", step, {})
    run, resumed = checkpoints.run_number(tmp_path, None), None
    for step in (3, 6):
        target = tmp_path / f"checkpoint-{step}"
        checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {})
        assert checkpoints.run_number(tmp_path, resumed) == run
        checkpoints.finish_checkpoint(target, step, {}, run=run)
        checkpoints.delete_oldest(tmp_path, 1, {target}, run)
        assert steps_of_ours(tmp_path) == [step, 20, 30]
        resumed = target
    assert checkpoints.run_number(tmp_path, tmp_path / "checkpoint-20") != run


def steps_of_ours(output):
    return sorted(int(path.name.rpartition("-")[2]) for path in output.glob("checkpoint-[0-9]*"))


def test_incomplete_checkpoints_are_never_used(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path / "nothing", True)[0] is None
    for step in (3, 6):
        target = tmp_path / f"checkpoint-{step}"
        checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": step})
        (checkpoints.place_to_write(target) / "model.safetensors").write_bytes(b"0123456789")
        checkpoints.finish_checkpoint(target, step, batches={})
    bare = tmp_path / "checkpoint-9"  # as another program writes it, in its place
    bare.mkdir()
    checkpoints.write_json(bare / "trainer_state.json", {"global_step": 9})
    found, notes = checkpoints.find_checkpoint(tmp_path, True)
    assert found == tmp_path / "checkpoint-6"
    assert notes == [
        f"`{bare}` is skipped: `{RECORD}` is missing or truncated, so it may be incomplete; to use it anyway, give "
        "its path",
        f"resuming from `{found}`, after 6 steps",
    ]
    assert checkpoints.find_checkpoint(tmp_path, str(bare))[0] == bare
    (bare / "trainer_state.json").write_text('{"global_st')
    damage = {
        "9": "`trainer_state.json` is truncated",
        "6": "`model.safetensors` has 4 bytes of 10",
        "3": "`model.safetensors` is missing",
        "12": "the folder does not exist",
    }
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"0123")
    assert checkpoints.find_checkpoint(tmp_path, True)[0] == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    assert "starting from the beginning" in checkpoints.find_checkpoint(tmp_path, True)[1][-1]
    for step, problem in damage.items():
        with pytest.raises(CheckpointError, match=f"checkpoint-{step}` is not a complete checkpoint: {problem}"):
            checkpoints.find_checkpoint(tmp_path, str(tmp_path / f"checkpoint-{step}"))
    with pytest.raises(ConfigError, match="true, false or a path, got 6"):
        checkpoints.find_checkpoint(tmp_path, 6)
    found, notes = checkpoints.find_checkpoint(tmp_path, False)
    assert found is None
    assert "has checkpoints of an earlier run (checkpoint-3, checkpoint-6). They are kept, except where" in notes[0]


def test_only_own_leftovers_are_cleared(tmp_path):
    unfinished = tmp_path / UNFINISHED
    for name in ("checkpoint-4", "checkpoint-2.deleted", "final.replaced", "final", "notes"):
        (unfinished / name).mkdir(parents=True)
    assert checkpoints.clear_leftovers(tmp_path) == ["checkpoint-2.deleted", "checkpoint-4", "final"]
    assert [path.name for path in unfinished.iterdir()] == ["notes"]
    assert (tmp_path / "final").exists()  # what was to be replaced has its name back
    assert checkpoints.clear_leftovers(tmp_path / "nothing") == []


def test_a_replaced_or_deleted_checkpoint_leaves_what_is_not_its_own(tmp_path):
    """Also in subfolders, such as DeepSpeed's, and under names that resemble those of a checkpoint."""
    first, second = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    own = ["model.safetensors", "trainer_state.json", "global_step2/zero.pt"]
    others = ["notes.txt", "model-ema.safetensors", "global_step2/mine.pt"]

    def write(target, files):
        for name in files:
            path = checkpoints.place_to_write(target) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"global_step": 2}')
        checkpoints.finish_checkpoint(target, int(target.name[-1]), {})

    def names(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    write(first, own)
    for name in others:
        (first / name).write_text("mine")
    write(first, own[:2])
    assert names(first) == {*own[:2], *others, checkpoints.RECORD}
    assert set(checkpoints.read_record(first)["files"]) == set(own[:2])
    write(second, own[:2])
    checkpoints.delete_oldest(tmp_path, 1, {second})
    assert names(first) == set(others)
    assert all((first / name).read_text() == "mine" for name in others)
    assert checkpoints.find_checkpoint(tmp_path, True)[0] == second


def test_a_failed_write_is_reported_in_one_line(tmp_path):
    target = tmp_path / "checkpoint-4"
    checkpoints.place_to_write(target).mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught, checkpoints.reporting_failed_save(target):
        raise OSError(28, "No space left on device")
    assert "No space left on device" in str(caught.value)
    assert "no earlier checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / UNFINISHED).exists()
    with pytest.raises(RuntimeError, match="another"), checkpoints.reporting_failed_save(target):
        raise RuntimeError("another failure than a write's")


def test_private_methods_of_trainer_exist():
    private = {
        name
        for name, entry in PRIVATE_NAMES.items()
        if entry.library == "transformers" and entry.rooms == ("training",) and hasattr(Trainer, name)
    }
    for name in private:
        ours, theirs = inspect.signature(getattr(ResumableTrainer, name)), inspect.signature(getattr(Trainer, name))
        assert list(ours.parameters) == list(theirs.parameters), name
        assert name in vars(ResumableTrainer)
    overridden = {name for name in vars(ResumableTrainer) if name in vars(Trainer) and not name.startswith("__")}
    assert {name for name in overridden if name.startswith("_")} == private


# Runs, in this process.


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    write_text(tmp_path / "text")
    return tmp_path


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [("steps", {"max_steps": 5, "save_steps": 2, "eval_steps": 2}, (4, 5)), ("epoch", {"max_steps": 7}, (5, 7))],
    ids=["steps", "epochs"],
)
def test_a_run_resumes(strategy, every, steps, root, capsys):
    """In one process, without a kill: the last checkpoint and the results are removed."""
    values = settings(root, "run", **dict.fromkeys(("save_strategy", "eval_strategy"), strategy), **every)
    results = run_recipe(load_recipe(RECIPE, values))
    whole = outcome(root / "run")
    assert "resuming" not in capsys.readouterr().out
    earlier, last = (root / "run" / f"checkpoint-{step}" for step in steps)
    (last / RECORD).unlink()
    record = json.loads((earlier / RECORD).read_text())
    assert 0 < record["seconds"] < results["seconds"]
    (earlier / RECORD).write_text(json.dumps({**record, "seconds": 1000.0}))
    results_again = run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": True}))
    assert results_again["seconds"] > 1000
    assert re.search(r"1\d\d\d seconds in total", (root / "run" / "report.md").read_text())
    said = capsys.readouterr().out
    assert f"`{last}` is skipped" in said
    assert f"resuming from `{earlier}`, after {steps[0]} steps" in said
    assert_equal(outcome(root / "run"), whole)
    assert results_again["test"] == results["test"]
    with pytest.raises(ConfigError, match=r"saved with other settings \(decay\)"):
        run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": True, "symphony.decay": 0.5}))
    for other, changed in (({"seed": 5}, "seed 0, now 5"), ({"data.block_size": 8}, "data.block_size 16, now 8")):
        with pytest.raises(ConfigError, match=rf"a run with other settings \({changed}\)"):
            run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": True, **other}))
    record = json.loads((last / RECORD).read_text())
    del record["seconds"]  # as of an earlier release
    (last / RECORD).write_text(json.dumps(record))
    run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": True}))  # it is over, but for what comes after
    assert f"seconds since step {steps[1]}, after which it was resumed" in (root / "run" / "report.md").read_text()
    assert_equal(outcome(root / "run"), whole)
    config = (last / "config.json").read_bytes()
    (last / "config.json").write_bytes(config[:-3].ljust(len(config)))  # as long as it was
    with pytest.raises(ConfigError, match=r"config\.json` is no JSON.*resume from another checkpoint"):
        run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": str(last)}))
    (last / "config.json").write_bytes(config)
    values["model.config"]["num_experts"] = 4
    with pytest.raises(CheckpointError, match=r"is of another model than the recipe's: size mismatch"):
        run_recipe(load_recipe(RECIPE, {**values, "resume_from_checkpoint": True}))


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ({"seed": 0}, {"seed": 1}, "seed 0, now 1"),
        ({"seed": 0}, {"seed": 0, "peft.r": 8}, "peft.r None, now 8"),
        ({"seed": 0, "peft.r": 8}, {"seed": 0}, "peft.r 8, now None"),
        ({"assistant_only_loss": False}, {"assistant_only_loss": True}, "assistant_only_loss False, now True"),
        ({"adam_beta1": 0.9}, {"adam_beta1": 0.8}, "adam_beta1 0.9, now 0.8"),
    ],
)
def test_settings_of_only_one_run_differ_too(before, now, changed, tmp_path):
    target = tmp_path / "checkpoint-3"
    checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": 3})
    checkpoints.finish_checkpoint(target, 3, batches={}, settings=before)
    resumed_settings.check_same_settings(before, target)
    with pytest.raises(ConfigError, match=rf"a run with other settings \({changed}\)"):
        resumed_settings.check_same_settings(now, target)
    # As of a release that did not record it.
    resumed_settings.check_same_settings({**before, "packing": True, "adam_beta2": 0.95}, target)


def test_a_recorded_vocabulary_that_had_no_effect_is_not_compared(tmp_path):
    """Earlier releases recorded it for a checkpoint with a tokenizer, too."""
    now = compared(tmp_path, model={"path": "someone/model"})
    target = tmp_path / "checkpoint-3"
    checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": 3})
    earlier = {**now, "data.vocab_size": 2048, "data.tokenizer": "words"}
    checkpoints.finish_checkpoint(target, 3, batches={}, settings=earlier)
    resumed_settings.check_same_settings(now, target)
    built = {**now, "data.vocab_size": 4096, "data.tokenizer": "bpe"}
    with pytest.raises(ConfigError, match=r"data\.vocab_size 2048, now 4096, data\.tokenizer 'words', now 'bpe'"):
        resumed_settings.check_same_settings(built, target)


def test_settings_of_tables_are_compared_only_where_a_table_is_read(tmp_path):
    """Earlier releases recorded `rows: lines` for text files, too."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Text.")
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "Text."}\n')
    for number, path in enumerate((None, str(tmp_path / "text"), str(tmp_path / "text" / "a.txt"))):
        now = compared(tmp_path, data={"path": path})
        earlier = {**now, "data.rows": "lines", "data.text_column": "body"}
        resumed_settings.check_same_settings(now, recorded(tmp_path / str(number), earlier))
    for number, path in enumerate((str(table), "someone/data")):
        now = compared(tmp_path, data={"path": path})
        target = recorded(tmp_path / f"table-{number}", {**now, "data.rows": "lines", "data.text_column": "body"})
        with pytest.raises(ConfigError, match=r"text_column 'body', now 'text', data.rows 'lines', now 'documents'"):
            resumed_settings.check_same_settings(now, target)


@pytest.mark.parametrize(
    ("data", "was_of_another_text"),
    [
        ({"kind": "chat", "path": "rows.jsonl"}, True),
        ({"kind": "glue", "name": "qnli"}, True),
        ({"kind": "llava", "path": "rows.json"}, True),
        ({"kind": "text", "path": "text"}, False),
        ({"kind": "chat"}, False),
        ({"kind": "glue", "name": "qnli", "path": "embedded"}, False),
    ],
    ids=str,
)
def test_a_run_resumes_with_the_tokenizer_that_it_trained(data, was_of_another_text, tmp_path):
    section = DataSection(**data)
    check = resumed_settings.check_same_tokenizer
    target = recorded(tmp_path / "now", {"seed": 0, resumed_settings.TOKENIZER: "a" * 64})
    check("a" * 64, section, target)
    check(None, section, target)  # another model's tokenizer, which is compared by the model's settings
    with pytest.raises(ConfigError, match=r"another trained tokenizer \(digest a{64}, now b{64}\): resume with the"):
        check("b" * 64, section, target)
    resumed_settings.check_same_settings({"seed": 0}, target)  # it is compared alone
    before = recorded(tmp_path / "before", {"seed": 0})  # a release that did not record it
    if was_of_another_text:
        with pytest.raises(ConfigError, match=rf"`{section.kind}` data on the running Python's library.* start a new"):
            check("a" * 64, section, before)
    else:
        check("a" * 64, section, before)


RUN = {"symphony.decay": 0.9}
GRAPHS = resumed_settings.graph_settings(load_recipe(RECIPE, RUN))


@pytest.mark.parametrize("form", ["config.json", "symphony_config.json", "the record"])
@pytest.mark.parametrize("stored", [GRAPHS, None])
def test_graphs_of_every_form_of_checkpoint_are_compared(form, stored, tmp_path):
    """A whole model, an adapter, and one whose form has no file of ours: sharded by FSDP."""
    target = tmp_path / "checkpoint-3"
    checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": 3})
    if form != "the record":
        checkpoints.write_json(checkpoints.place_to_write(target) / form, {"symphony": stored})
    settings = {"symphony": stored} if form == "the record" else None
    checkpoints.finish_checkpoint(target, 3, batches={}, settings=settings)
    resumed_settings.check_same_graphs(stored, target)
    other = resumed_settings.graph_settings(load_recipe(RECIPE, {**RUN, "symphony.decay": 0.5}))
    with pytest.raises(ConfigError, match=r"saved with other settings \(.*decay"):
        resumed_settings.check_same_graphs(other, target)
    resumed_settings.check_same_settings({}, target)  # these are compared alone


def test_a_sharded_checkpoint_of_a_release_that_did_not_record_graphs_is_accepted(tmp_path):
    checkpoints.write_json(checkpoints.place_to_write(tmp_path / "checkpoint-3") / "trainer_state.json", {})
    checkpoints.finish_checkpoint(tmp_path / "checkpoint-3", 3, batches={}, settings={"seed": 0})
    resumed_settings.check_same_graphs(GRAPHS, tmp_path / "checkpoint-3")


def test_a_graph_from_a_path_is_compared_as_the_average_that_it_becomes():
    settings = resumed_settings.graph_settings(load_recipe(RECIPE, {"symphony.graph": "runs/earlier"}))
    assert settings["graph"] == "ema"


@pytest.mark.parametrize("name", ["optim", "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"])
def test_settings_of_the_optimizer_and_the_loss_are_recorded(name, tmp_path):
    """The optimizer's saved state has its own, so that other ones would have no effect."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert resumed_settings.settings_of(load_recipe(RECIPE), arguments)[name] == getattr(arguments, name)


def recorded(output, settings):
    """Write a checkpoint of a run with settings, and return it."""
    target = output / "checkpoint-3"
    checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": 3})
    checkpoints.finish_checkpoint(target, 3, batches={}, settings=settings)
    return target


def compared(output, model=None, peft=None, data=None, **settings):
    model = ModelSection(**(model or {"config": {"model_type": "olmoe"}}))
    recipe = Recipe(model=model, peft=peft, data=DataSection(**(data or {})))
    return resumed_settings.settings_of(recipe, TrainingArguments(str(output), use_cpu=True, report_to=[], **settings))


COMMIT = "a" * 40
OTHER_BASES = [
    ({"path": "someone/other"}, "model.path 'someone/base', now 'someone/other'"),
    ({"path": "someone/base", "revision": "v2"}, "model.revision 'main', now 'v2'"),
]
PARTLY_TRAINED = [({}, PeftSection()), ({"trainable": ["*gate*"]}, None)]


@pytest.mark.parametrize(("more", "peft"), PARTLY_TRAINED, ids=["peft", "trainable"])
@pytest.mark.parametrize(("now", "changed"), OTHER_BASES)
def test_another_base_model_is_refused_where_most_of_it_stays(now, changed, more, peft, tmp_path):
    """Of adapters, a checkpoint has no other weights than theirs."""
    target = recorded(tmp_path, compared(tmp_path, {"path": "someone/base", **more}, peft))
    same = compared(tmp_path, {"path": "someone/base", "revision": "main", **more}, peft)
    assert resumed_settings.check_same_settings(same, target) == []
    with pytest.raises(ConfigError, match=rf"a run with other settings \({changed}\)"):
        resumed_settings.check_same_settings(compared(tmp_path, {**now, **more}, peft), target)


@pytest.mark.parametrize(("now", "changed"), OTHER_BASES)
def test_another_base_model_is_noted_where_all_of_it_is_trained(now, changed, tmp_path):
    """The weights are those of the checkpoint."""
    target = recorded(tmp_path, compared(tmp_path, {"path": "someone/base"}))
    (note,) = resumed_settings.check_same_settings(compared(tmp_path, now), target)
    assert changed in note


@pytest.mark.parametrize(("more", "peft"), [*PARTLY_TRAINED, ({}, None)], ids=["peft", "trainable", "all"])
@pytest.mark.parametrize("before", [None, "v1"])
def test_a_commit_of_the_base_model_is_noted(before, more, peft, tmp_path):
    """It may be the one that the branch or tag had. Another commit than the recorded one is another model."""
    recipe = {"path": "someone/base", **more}
    target = recorded(tmp_path / "named", compared(tmp_path, {**recipe, "revision": before}, peft))
    (note,) = resumed_settings.check_same_settings(compared(tmp_path, {**recipe, "revision": COMMIT}, peft), target)
    assert f"model.revision '{before or 'main'}', now '{COMMIT}'" in note
    target = recorded(tmp_path / "commit", compared(tmp_path, {**recipe, "revision": "b" * 40}, peft))
    now = compared(tmp_path, {**recipe, "revision": COMMIT}, peft)
    if peft is None and not more:
        assert len(resumed_settings.check_same_settings(now, target)) == 1
    else:
        with pytest.raises(ConfigError, match=r"model.revision 'b{40}', now 'a{40}'"):
            resumed_settings.check_same_settings(now, target)


def test_other_trained_parameters_are_refused(tmp_path):
    target = recorded(tmp_path, compared(tmp_path, {"path": "someone/base"}))
    now = compared(tmp_path, {"path": "someone/base", "trainable": ["gate"]})
    with pytest.raises(ConfigError, match=r"a run with other settings \(model.trainable None, now \['gate'\]\)"):
        resumed_settings.check_same_settings(now, target)


@pytest.mark.parametrize("now", ["moved/base", "someone/base"], ids=["another folder", "the Hub"])
def test_a_base_model_in_another_place_is_noted(now, tmp_path, monkeypatch):
    """It may be the same one. A relative path that is gone looks like a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/base", "moved/base"):
        Path(folder).mkdir(parents=True)
    target = recorded(tmp_path, compared(tmp_path, {"path": "runs/base"}))
    shutil.rmtree("runs")
    (note,) = resumed_settings.check_same_settings(compared(tmp_path, {"path": now}), target)
    assert f"model.path 'runs/base', now '{now}'" in note


@pytest.mark.parametrize(
    "changed",
    [{"max_steps": 20}, {"warmup_steps": 5}, {"num_train_epochs": 4}, {"lr_scheduler_kwargs": {"num_cycles": 2}}],
    ids=str,
)
def test_another_schedule_is_noted(changed, tmp_path):
    """A longer run is legitimate."""
    target = recorded(tmp_path, compared(tmp_path))
    assert resumed_settings.check_same_settings(compared(tmp_path), target) == []
    (note,) = resumed_settings.check_same_settings(compared(tmp_path, **changed), target)
    assert re.search(rf"another schedule \({next(iter(changed))} .*\): the learning rate", note)
    record = json.loads((target / RECORD).read_text())
    for name in [*changed, "model.path", "model.on_hub", "model.revision", "model.trainable"]:
        del record["settings"][name]  # as of a release that did not record it
    (target / RECORD).write_text(json.dumps(record))
    now = compared(tmp_path, {"path": "someone/other"}, **changed)
    assert resumed_settings.check_same_settings(now, target) == []


def resumable(output, **settings):
    """Arguments that resume from a checkpoint of step 3, saved by one process in batches of 4."""
    target = output / "checkpoint-3"
    checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": 3})
    batches = {"processes": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    checkpoints.finish_checkpoint(target, 3, batches)
    arguments = TrainingArguments(str(output), use_cpu=True, report_to=[], **settings)
    arguments.resume_from_checkpoint = True
    return arguments


def test_weights_alone_are_refused_under_deepspeed(tmp_path, monkeypatch, capsys):
    """Its loader needs its own states. Without it, the optimizer starts anew."""
    arguments = resumable(tmp_path)
    checkpoint_to_resume(arguments)
    assert "the optimizer and the random states start anew" in capsys.readouterr().out
    monkeypatch.setattr(resuming, "expected_strategy", lambda arguments: "zero2")
    with pytest.raises(CheckpointError, match=r"checkpoint-3` has only weights.* its own states .*another checkpoint$"):
        checkpoint_to_resume(arguments)
    (tmp_path / "checkpoint-3" / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"another checkpoint, or .* `model.path` .* and `model.tokenizer` to"):
        checkpoint_to_resume(arguments)


def test_other_batches_are_noted(tmp_path, capsys):
    """Trainer finds its place in the epoch by steps: with other batches it skips or repeats data."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    checkpoint_to_resume(resumable(tmp_path, **batches))
    assert "saved with other batches (gradient_accumulation_steps 1, now 2)" in capsys.readouterr().out
    checkpoint_to_resume(resumable(tmp_path, **{**batches, "gradient_accumulation_steps": 1}))
    assert "other batches" not in capsys.readouterr().out


def test_processes_that_find_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """Machines without a shared disk, where only the first has saved."""
    arguments = resumable(tmp_path)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: [*found, "none"])
    with pytest.raises(ConfigError, match=r"different checkpoints \(checkpoint-3, none\).*`save_on_each_node: true`"):
        checkpoint_to_resume(arguments)


# Runs in processes of their own, killed. A server that has imported everything forks them.


class Runs:
    """Runs of recipes in subfolders of one folder."""

    def __init__(self, root):
        self.root = root
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["resume_runs"])
        first = self.context.Process(target=os.getpid)  # the server starts with it, and takes seconds to
        first.start()
        first.join()

    def start(self, values, log="log", **how):
        process = self.context.Process(target=run, args=(values, str(self.root / log)), kwargs=how)
        process.start()
        return process

    def finish(self, values, log="log", code=0, **how):
        """Run a recipe, and return what it printed."""
        process = self.start(values, log, **how)
        process.join(120)
        text = (self.root / log).read_text()
        assert process.exitcode == code, text[-3000:]
        return text

    def whole(self, name, family="olmoe", **how):
        """Run without interruption. Returns its settings, outcome, number of file operations and seconds."""
        values = settings(self.root, name, family)
        started = time.monotonic()
        self.finish(values, f"{name}.log", kill_at=0, **how)
        seconds = time.monotonic() - started
        operations = (self.root / f"{name}.log.events").read_text().splitlines()
        return values, outcome(self.root / name), operations, seconds

    def resume_and_compare(self, values, expected, **how):
        folder = Path(values["output.directory"])
        check_whole(folder)
        steps = steps_of(folder)
        said = self.finish({**values, "resume_from_checkpoint": True}, **how)
        if steps:
            assert f"resuming from `{folder / f'checkpoint-{steps[-1]}'}`" in said
        else:
            assert "starting from the beginning" in said
        assert not (folder / UNFINISHED).exists()
        assert_equal(outcome(folder), expected)


def check_whole(folder):
    """Check that named folders are complete, by loading them instead of by the record."""
    for checkpoint in folder.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert f"checkpoint-{state['global_step']}" == checkpoint.name
        assert load_file(checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt"):
            assert torch.load(checkpoint / name, weights_only=True)
        assert list(checkpoint.glob("rng_state*"))
    if (folder / "final").exists():
        assert load_file(folder / "final" / "model.safetensors")
        assert json.loads((folder / "final" / "tokenizer.json").read_text())
    if (folder / "results.json").exists():
        assert json.loads((folder / "results.json").read_text())["test"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_text(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *sys.path]))  # the server does not get it otherwise
        yield Runs(root)


@pytest.fixture(scope="module")
def whole(runs):
    return runs.whole("whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(seed, runs, whole):
    """Eight kills at a random time, and twelve before a random file operation, where most failures could occur."""
    _, expected, operations, seconds = whole
    values = settings(runs.root, f"killed-{seed}")
    moment = random.Random(seed)
    if seed < 8:
        delay, code = moment.uniform(0.05, 0.8) * seconds, 0
        while code == 0:  # over before the time came: the machine is faster than it was
            shutil.rmtree(values["output.directory"], ignore_errors=True)
            process = runs.start(values)
            process.join(delay)
            process.kill()
            process.join()
            code, delay = process.exitcode, delay / 2
        assert code == -signal.SIGKILL
    else:
        runs.finish(values, code=-signal.SIGKILL, kill_at=moment.randint(1, len(operations)))
    runs.resume_and_compare(values, expected)


@pytest.mark.slow
def test_killed_again_and_again(runs, whole):
    """Each resumed run is killed too, until one finishes."""
    _, expected, operations, _ = whole
    values, moment = settings(runs.root, "again"), random.Random(0)
    for _ in range(6):
        process = runs.start(
            {**values, "resume_from_checkpoint": True}, kill_at=moment.randint(1, len(operations) // 3)
        )
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    runs.resume_and_compare(values, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_other_families_from_a_checkpoint(family, runs):
    """Fine-tuning of a saved model, whose weights are memory-mapped."""
    runs.finish(settings(runs.root, f"{family}-base", family, max_steps=2))
    saved = {"model.path": str(runs.root / f"{family}-base" / "final"), "model.config": None}
    values = settings(runs.root, f"{family}-whole", family, **saved)
    runs.finish(values, kill_at=0)
    operations = (runs.root / "log.events").read_text().splitlines()
    expected = outcome(runs.root / f"{family}-whole")
    values = settings(runs.root, f"{family}-killed", family, **saved)
    runs.finish(values, code=-signal.SIGKILL, kill_at=len(operations) * 2 // 3)
    runs.resume_and_compare(values, expected)


@pytest.mark.slow
def test_a_plain_model_keeps_its_experts(runs):
    """A stock Trainer would silently resume an OLMoE without its experts."""
    recipe = runs.root / "plain.yaml"
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE.read_text()), "symphony": None}))

    def plain(name, **more):
        values = settings(runs.root, name, **more)
        del values["symphony.decay"]
        return values

    runs.finish(plain("plain"), recipe=recipe, kill_at=0)
    operations = (runs.root / "log.events").read_text().splitlines()
    expected = outcome(runs.root / "plain")
    runs.finish(plain("plain-killed"), recipe=recipe, code=-signal.SIGKILL, kill_at=len(operations) * 2 // 3)
    runs.resume_and_compare(plain("plain-killed"), expected, recipe=recipe)


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint(full_at, runs, whole):
    """A limit on file size stands for the full disk."""
    _, expected, operations, _ = whole
    values = settings(runs.root, f"full-{full_at}")
    folder = Path(values["output.directory"])
    after_6 = next(
        n for n, line in enumerate(operations) if f"open {runs.root / 'whole'}/{UNFINISHED}/checkpoint-9" in line
    )
    runs.finish(values, code=-signal.SIGKILL, kill_at=after_6 + 1)
    before = steps_of(folder)[-1]
    limit = (folder / f"checkpoint-{before}" / full_at).stat().st_size - 1
    text = runs.finish({**values, "resume_from_checkpoint": True}, code=1, file_limit=limit)
    error = text.splitlines()[-1]
    assert error.startswith(f"error: `{folder / f'checkpoint-{before + 3}'}` could not be written; the disk had ")
    assert f"Free space, then resume from `{folder / f'checkpoint-{before}'}`, which is complete" in error
    assert "Traceback" not in text
    runs.resume_and_compare(values, expected)


class Ranks(Runs):
    """The same with two processes per run."""

    def start(self, values, log="log", kill_at=None, **how):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
        processes = []
        for rank in (1, 0):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            name, number = (log, kill_at) if rank == 0 else (f"{log}.1", None)
            processes.append(super().start(values, name, environment=environment, kill_at=number, **how))
        self.other = processes[0]
        return processes[1]

    def finish(self, values, log="log", code=0, **how):
        try:
            return super().finish(values, log, code, **how)
        finally:
            if code != 0:
                self.other.kill()  # as a launcher does
            self.other.join()


@pytest.mark.slow
@pytest.mark.enable_socket
def test_two_processes(runs):
    """The sum of two ranks' gradients does not depend on their order, so runs are equal bit for bit here too."""
    ranks = Ranks(runs.root)
    _, expected, operations, _ = ranks.whole("ranks")
    moment = random.Random(0)
    for number in range(4):
        values = settings(runs.root, f"ranks-{number}")
        ranks.finish(values, code=-signal.SIGKILL, kill_at=moment.randint(len(operations) // 4, len(operations)))
        ranks.resume_and_compare(values, expected)


ACCELERATE = "accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no"


def launch(values, cache, how="--cpu --num_processes 1"):
    return subprocess.Popen(
        [sys.executable, "-m", *ACCELERATE.split(), *how.split(), "-m", "symphony_hf.train", *words(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SYMPHONY_HF_CACHE": str(cache), "PYTHONUNBUFFERED": "1"},
    )


def kill_launch(process):
    """Kill a launch with all of its processes, which DeepSpeed's launcher puts into sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def launch_and_kill(values, cache, within_save, how="--cpu --num_processes 1"):
    """Wait until the first checkpoint is complete, or the third is being written."""
    folder = Path(values["output.directory"])
    awaited = [folder / "checkpoint-3"]
    if within_save:
        awaited = [folder / UNFINISHED / "checkpoint-9", folder / "checkpoint-9"]
    while True:
        process = launch(values, cache, how)
        while process.poll() is None and not any(path.exists() for path in awaited):
            time.sleep(0.001)
        kill_launch(process)
        said, _ = process.communicate()
        assert steps_of(folder), said[-3000:]
        if not (folder / "results.json").exists():
            return
        shutil.rmtree(folder)  # we were too late


@pytest.mark.slow
@pytest.mark.parametrize("within_save", [False, True])
def test_accelerate_launch(within_save, runs, whole):
    values = settings(runs.root, f"launched-{within_save}")
    folder = Path(values["output.directory"])
    launch_and_kill(values, runs.root / "cache", within_save)
    check_whole(folder)
    process = launch({**values, "resume_from_checkpoint": True}, runs.root / "cache")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    assert "symphony_hf: resuming from" in said
    assert_equal(outcome(folder), whole[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_zero(stage, runs):
    """Each rank writes its optimizer states and, under ZeRO-3, its weights: a checkpoint needs all of them."""
    pytest.importorskip("deepspeed")
    how = f"--use_deepspeed --zero_stage {stage} --num_processes 2"

    def finish(values):
        said, _ = launch(values, runs.root / "cache", how).communicate(timeout=240)
        assert (Path(values["output.directory"]) / "results.json").exists(), said[-3000:]
        return said

    finish(settings(runs.root, f"zero{stage}-whole"))
    values = settings(runs.root, f"zero{stage}")
    launch_and_kill(values, runs.root / "cache", within_save=True, how=how)
    folder = runs.root / f"zero{stage}"
    assert all(len(list(path.glob("global_step*/*optim_states.pt"))) == 2 for path in folder.glob("checkpoint-*"))
    said = finish({**values, "resume_from_checkpoint": True})
    assert "symphony_hf: resuming from" in said
    # A sum of two ranks' gradients is the same in either order, so they are equal to the bit.
    assert_equal(outcome(folder), outcome(runs.root / f"zero{stage}-whole"))


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(1200)
def test_twenty_kills_of_one_launch(runs):
    """Each after a seeded number of saves plus a seeded delay, so that a run advances on a slow machine too."""
    values = settings(runs.root, "launched-whole", max_steps=120)
    runs.finish(values, "launched-whole.log")
    expected = outcome(runs.root / "launched-whole")
    values["output.directory"] = str(runs.root / "launched-20")
    folder, moment = runs.root / "launched-20", random.Random(0)
    for _ in range(20):
        process = launch({**values, "resume_from_checkpoint": True}, runs.root / "cache")
        said = ""
        while "symphony_hf: resuming from" not in said and "starting from the beginning" not in said:
            line = process.stdout.readline()
            assert line, said[-3000:]
            said += line
        last = max(steps_of(folder), default=0) + 3 * moment.randint(0, 2)
        while process.poll() is None and max(steps_of(folder), default=0) < last:
            time.sleep(0.001)
        time.sleep(moment.uniform(0.0, 0.1))
        kill_launch(process)
        said += process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), said[-3000:]
        if (folder / "results.json").exists():
            assert_equal(outcome(folder), expected)
            shutil.rmtree(folder)  # it was faster than we: the next one begins anew
        else:
            check_whole(folder)
    process = launch({**values, "resume_from_checkpoint": True}, runs.root / "cache")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert_equal(outcome(folder), expected)


# Trainers of transformers' own.


def trained(trainer_class, model, folder, resume=None, limit=None, settings=None, **more):
    """Return the logs, weights and graphs after eight steps."""
    data = [{"input_ids": row, "labels": row} for row in make_ids(40, 12)]
    how = {"max_steps": 8, "save_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    how["save_total_limit"] = limit
    quiet = {"disable_tqdm": True, "report_to": "none", "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(folder), **how, **quiet, **(settings or {}))
    trainer = trainer_class(model.train(), arguments, train_dataset=data, eval_dataset=data[:4], **more)
    trainer.train(resume_from_checkpoint=resume)
    return [trainer.state.log_history[:-1], {name: value.clone() for name, value in model.state_dict().items()}]


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_bare_trainer_resumes_too(graph, tmp_path):
    """Without the runner: a symphonized model and the callback suffice if the checkpoint is complete."""

    def model():
        settings = {"decay": 0.9} if graph == "ema" else {}
        return symphonize(make_model(attention_dropout=0.1), graph=graph, **settings)

    expected = trained(Trainer, model(), tmp_path / "whole", callbacks=[SymphonyCallback()])
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    assert_equal(trained(Trainer, model(), tmp_path / "on", checkpoint, callbacks=[SymphonyCallback()]), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_bare_trainers_checkpoint_of_a_plain_model_is_converted(family, tmp_path, monkeypatch):
    """It has the Hub's tensor names, and a stock Trainer would resume from it without the experts."""
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    expected = trained(Trainer, make_model(family), tmp_path / "whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    assert_equal(trained(ResumableTrainer, make_model(family, seed=1), tmp_path / "on", checkpoint), expected)
    assert ["Trainer would skip" in message for message in said] == [True]


def test_checkpoints_that_a_kill_left_undeleted_are_deleted_when_the_run_resumes(tmp_path, monkeypatch):
    """The kill came between the completion of the last checkpoint and the deletion of the one before it."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "delete_oldest", lambda *arguments: None)
        expected = trained(ResumableTrainer, make_model(), tmp_path, limit=1)
    assert steps_of(tmp_path) == [4, 8]
    assert_equal(trained(ResumableTrainer, make_model(), tmp_path, str(tmp_path / "checkpoint-8"), limit=1), expected)
    assert steps_of(tmp_path) == [8]
    (tmp_path / "checkpoint-8").rename(tmp_path / "elsewhere")
    trained(ResumableTrainer, make_model(), tmp_path, str(tmp_path / "elsewhere"), limit=1)
    assert steps_of(tmp_path) == []  # it was over, and there is nothing to delete


@pytest.mark.thorough
def test_a_run_that_begins_anew_leaves_an_earlier_runs_checkpoints(tmp_path):
    """Under a limit of one, with a best checkpoint too: Trainer alone would delete all others at the end."""
    trained(ResumableTrainer, make_model(), tmp_path, limit=1)
    (tmp_path / "checkpoint-8").rename(tmp_path / "checkpoint-20")
    best_is_first = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    best_is_first |= {"greater_is_better": True}
    trained(ResumableTrainer, make_model(), tmp_path, limit=1, settings=best_is_first)
    assert steps_of(tmp_path) == [4, 8, 20]


def test_the_best_checkpoint_is_the_best_of_those_saved(tmp_path):
    """The best step is 2, at which this run saves nothing, and an earlier one did."""
    trained(ResumableTrainer, make_model(), tmp_path, limit=1)
    (tmp_path / "checkpoint-8").rename(tmp_path / "checkpoint-2")
    best_is_first = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    trained(ResumableTrainer, make_model(), tmp_path, settings={**best_is_first, "greater_is_better": True})
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6, 8]
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{max((4, 8), key=losses.get)}")


@pytest.mark.parametrize(("greater", "values", "best"), [(False, (3, 1, 2, 9), 6), (True, (3, 9, 2, 1), 2)])
def test_an_older_best_folder_gives_way_to_a_better_one(greater, values, best, tmp_path):
    """Checkpoints are at 2 and 6, and the best evaluation is at 4. One that is not a number is never the best."""
    for step in (2, 6, 8):
        target = tmp_path / f"checkpoint-{step}"
        checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": step})
        checkpoints.finish_checkpoint(target, step, batches={})
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], metric_for_best_model="loss", greater_is_better=greater
    )
    history = [{"step": 2 * n, "eval_loss": float(value)} for n, value in enumerate(values, 1)]
    history[-1]["eval_loss"] = float("nan")
    state = TrainerState(log_history=history)
    assert trainer_module._best_checkpoint(tmp_path, arguments, state, 0) == tmp_path / f"checkpoint-{best}"
    assert trainer_module._best_checkpoint(tmp_path, arguments, state, 1) is None  # of another run


@pytest.mark.thorough
def test_the_best_adapter_is_loaded_as_it_was_saved(tmp_path, monkeypatch):
    """PEFT's own loader drops tensors of some families."""
    model = add_adapters(symphonize(make_model()), PeftSection(router="train", r=2))
    monkeypatch.setattr(type(model), "load_adapter", None)  # calling it would raise
    best_is_first = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    best_is_first |= {"greater_is_better": True, "load_best_model_at_end": True, "learning_rate": 0.01}
    callbacks = [SymphonyCallback()]
    _, weights = trained(ResumableTrainer, model, tmp_path, settings=best_is_first, callbacks=callbacks)
    stored = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    graphs = {name: tensor for name, tensor in stored.items() if name.endswith("adjacency")}
    assert len(graphs) == 3
    for name, tensor in graphs.items():
        assert torch.equal(weights[name.replace("gate.symphony", "gate.modules_to_save.default.symphony")], tensor)


def test_the_best_stays_where_its_folder_was_moved(tmp_path, monkeypatch):
    """Trainer then forgets its path."""
    for step in (4, 6, 8):
        target = tmp_path / f"checkpoint-{step}"
        checkpoints.write_json(checkpoints.place_to_write(target) / "trainer_state.json", {"global_step": step})
        checkpoints.finish_checkpoint(target, step, batches={})
    best = {"metric_for_best_model": "loss", "greater_is_better": False}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_total_limit=2, **best)
    state = TrainerState(global_step=8, log_history=[{"step": 4, "eval_loss": 1.0}, {"step": 6, "eval_loss": 2.0}])
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "should_save", property(lambda self: False))  # of another process
        trainer_module.ResumableFlow().on_train_begin(arguments, state, TrainerControl())
    assert steps_of(tmp_path) == [4, 6, 8]
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")  # all of them load it at the end
    state.best_model_checkpoint = None
    trainer_module.ResumableFlow().on_train_begin(arguments, state, TrainerControl())
    assert steps_of(tmp_path) == [4, 8]
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


def test_the_best_is_loaded_where_the_folder_was_moved(tmp_path):
    """The run is over but for its end. The state names the old folder."""
    best_is_first = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    best_is_first |= {"load_best_model_at_end": True, "learning_rate": 0.01}
    trained(ResumableTrainer, make_model(), tmp_path / "run", settings=best_is_first)
    (tmp_path / "run").rename(tmp_path / "moved")
    last = str(tmp_path / "moved" / "checkpoint-8")
    _, weights = trained(ResumableTrainer, make_model(), tmp_path / "moved", last, settings=best_is_first)
    found = json.loads((tmp_path / "moved" / "checkpoint-8" / "trainer_state.json").read_text())
    assert found["best_global_step"] == 4
    stored = load_file(tmp_path / "moved" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("logging", ["no", "steps"])
def test_a_mean_loss_of_the_whole_run_or_none(logging, tmp_path):
    """Where no step was logged before the resume, Trainer's own mean is of the rest."""

    def described(resume):
        folder = tmp_path / "run"
        data = [{"input_ids": row, "labels": row} for row in make_ids(40, 12)]
        how = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "per_device_train_batch_size": 4}
        quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "dataloader_pin_memory": False}
        arguments = TrainingArguments(str(folder), logging_strategy=logging, logging_steps=2, **how, **quiet)
        trainer = train(symphonize(make_model()), data, None, arguments, resume_from=resume)
        results = describe_run(load_recipe(RECIPE), trainer, PreparedData("text", train=data), "")
        return results, "\n".join(report_lines({**results, "test": {}, "seconds": 7.0}, folder))

    whole, page = described(None)
    assert f"4 steps, mean loss {whole['train']['train_loss']:.4f}, 7 seconds in total" in page
    resumed, page = described(tmp_path / "run" / "checkpoint-2")
    if logging == "no":
        assert "train_loss" not in resumed["train"]
        assert "Training: 4 steps, 7 seconds in total." in page
    else:  # sums of float32 in another order
        assert resumed["train"]["train_loss"] == pytest.approx(whole["train"]["train_loss"], rel=1e-6)
        assert "4 steps, mean loss" in page
