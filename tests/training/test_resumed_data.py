"""A run resumes on the data that it began with, in the same order, after the end of a stream too."""

import json

import pytest
from small_runs import RECIPE, recipe_overrides
from transformers import TrainingArguments

from symphony_hf.errors import ConfigError
from symphony_hf.recipe import load_recipe
from symphony_hf.training import resumed_settings, runner
from symphony_hf.training.runner import run_recipe
from symphony_hf.training.trainer_checkpoints import RECORD


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Overrides that scale the recipe down to seconds."""
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    return recipe_overrides(tmp_path)


@pytest.mark.thorough
def test_a_stream_that_is_read_more_than_once_resumes_where_it_was(small, tmp_path):
    """Its six documents for training give fewer batches than the run has steps."""
    table = tmp_path / "rows.jsonl"
    rows = [f"row {n} of {n * 7919} numbers, {n * 31} words and {n % 7} signs" for n in range(300)]
    table.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    streamed = {**small, "data.path": str(table), "data.streaming": True, "data.limit": 6, "max_steps": 20}
    saved = {"save_strategy": "steps", "save_steps": 13, "eval_strategy": "no"}
    whole = run_recipe(load_recipe(RECIPE, {**streamed, **saved, "output.directory": str(tmp_path / "run")}))
    again = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-13")}
    resumed = run_recipe(load_recipe(RECIPE, {**streamed, **again, "output.directory": str(tmp_path / "again")}))
    assert whole["steps"] == resumed["steps"] == 20
    # The loss of a batch that is another one differs in its first digits.
    assert resumed["train"]["train_loss"] == pytest.approx(whole["train"]["train_loss"], rel=1e-6)
    assert resumed["test"] == whole["test"]


def write_record(folder, settings):
    (folder / RECORD).write_text(json.dumps({"step": 1, "order": 1, "files": {}, "settings": settings}))


@pytest.mark.parametrize(("name", "value"), [("train_sampling_strategy", "sequential"), ("dataloader_drop_last", True)])
def test_settings_of_the_order_of_rows_must_stay(name, value, small, tmp_path):
    before, now = (
        resumed_settings.settings_of(
            load_recipe(RECIPE, small), TrainingArguments(str(tmp_path), use_cpu=True, **given)
        )
        for given in ({}, {name: value})
    )
    write_record(tmp_path, before)
    with pytest.raises(ConfigError, match=rf"a run with other settings \({name} .*, now {value!r}\)"):
        resumed_settings.check_same_settings(now, tmp_path)
    del before[name]  # a release that did not record it
    write_record(tmp_path, before)
    resumed_settings.check_same_settings(now, tmp_path)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")  # newer releases of TRL
@pytest.mark.parametrize(
    ("name", "value"), [("packing_strategy", "bfd_split"), ("truncation_mode", "keep_end"), ("shuffle_dataset", True)]
)
def test_settings_of_the_rows_of_conversations_must_stay(name, value, small, tmp_path):
    from trl import SFTConfig

    recipe = load_recipe(RECIPE, small)
    now = resumed_settings.settings_of(recipe, SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value}))
    assert now[name] == value


def test_a_run_resumes_on_the_same_data(small, tmp_path, monkeypatch):
    saved = {**small, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run_recipe(load_recipe(RECIPE, saved))
    changed = tmp_path / "text" / "0.txt"
    checkpoint = tmp_path / "run" / "checkpoint-1"
    text = changed.read_text()
    changed.write_text(text.replace("word", "term"))
    monkeypatch.setattr(runner, "load_model", None)  # calling it would raise another error
    with pytest.raises(ConfigError, match=r"is of a run on other data \(revision \w{64}, now \w{64}\): restore"):
        run_recipe(load_recipe(RECIPE, {**saved, "resume_from_checkpoint": str(checkpoint)}))
    changed.write_text(text)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # the data is accepted
        run_recipe(load_recipe(RECIPE, {**saved, "resume_from_checkpoint": str(checkpoint)}))
    record = json.loads((checkpoint / RECORD).read_text())
    record["settings"]["tokenizer_digest"] = "0" * 64
    (checkpoint / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"another trained tokenizer \(digest 0{64}, now \w{64}\)"):
        run_recipe(load_recipe(RECIPE, {**saved, "resume_from_checkpoint": str(checkpoint)}))
    del record["settings"]["data_revision"], record["settings"]["tokenizer_digest"]  # a release without them
    (checkpoint / RECORD).write_text(json.dumps(record))
    resumed_settings.check_same_data("0" * 64, checkpoint)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # text files had the same tokenizer
        run_recipe(load_recipe(RECIPE, {**saved, "resume_from_checkpoint": str(checkpoint)}))


def test_a_commit_is_the_same_by_any_name(small, tmp_path):
    """A run without `data.revision` resumes after the data set has changed, by the commit that the error names."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    recipes = (load_recipe(RECIPE, {**small, **given}) for given in ({}, {"data.revision": "a" * 40}))
    before, now = (resumed_settings.settings_of(recipe, arguments) for recipe in recipes)
    write_record(tmp_path, {**before, "data_revision": "a" * 40})
    with pytest.raises(ConfigError, match=r"revision a{40}, now b{40}\): restore it"):
        resumed_settings.check_same_data("b" * 40, tmp_path)
    resumed_settings.check_same_settings(now, tmp_path)
    resumed_settings.check_same_data("a" * 40, tmp_path)
    write_record(tmp_path, before)  # a release that did not record the commit
    with pytest.raises(ConfigError, match=r"a run with other settings \(data.revision None, now 'a{40}'\)"):
        resumed_settings.check_same_settings(now, tmp_path)


@pytest.mark.thorough
def test_seconds_stay_unknown(small, tmp_path):
    """Of a run that began under a release that did not record them, whose later checkpoints cannot either."""
    every_step = {**small, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    results = run_recipe(load_recipe(RECIPE, every_step))
    assert "seconds_since_step" not in results
    for step in (1, 2):
        record = tmp_path / "run" / f"checkpoint-{step}" / RECORD
        written = json.loads(record.read_text())
        if step == 1:
            del written["seconds"]
            record.write_text(json.dumps(written))
        assert "seconds" not in written
        results = run_recipe(load_recipe(RECIPE, {**every_step, "resume_from_checkpoint": str(record.parent)}))
        assert results["seconds_since_step"] == step
