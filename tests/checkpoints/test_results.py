"""What was measured of a model, in its card: by the recipes' runner, and by the quickstart."""

import json
import shutil
from pathlib import Path

import pytest
from pushed import card_of, make_run

from symphony_hf import PushError, export_folded, push
from symphony_hf.checkpoints.upload import write_card
from symphony_hf.recipe import load_recipe
from symphony_hf.training.runner import run_recipe

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's, about its LFS upload
]
RECIPES = Path(__file__).parents[2] / "recipes"
REPORT = RECIPES / "quickstart" / "report.json"


def quiet(folder):
    """Overrides of a recipe that a test runs."""
    run = {"output.directory": str(folder / "run"), "disable_tqdm": True, "dataloader_pin_memory": False}
    return {**run, "use_cpu": True, "per_device_train_batch_size": 2}


def test_a_run_is_pushed_with_its_results_and_without_its_state(hub, model, tmp_path, caplog):
    run = make_run(tmp_path, model, model={"path": "them/base"}, data={"path": "them/words"})
    push(run, "me/it")
    assert not {"training_args.bin", "results.json"} & set(hub.files("me/it"))
    assert "left out: training_args.bin (a pickle of Trainer's state)" in caplog.text
    card = card_of(hub)
    assert card.data.base_model == "them/base"
    assert card.data.datasets == ["them/words"]
    by_name = {result.metric_name: result for result in card.data.eval_results}
    assert by_name["perplexity, clean"].metric_value == 10.0
    assert by_name["perplexity, attacked"].metric_value == 25.0
    assert by_name["perplexity, attacked"].dataset_type == "them/words"
    for row in ("| perplexity, clean | 10.00 |", "| attacked / clean | 2.5000 |"):
        assert row in card.text
    assert "On 7 held-out documents" in card.text


def test_a_run_that_diverged_has_a_card_without_these_scores(hub, model, tmp_path):
    run = make_run(tmp_path, model)
    values = json.loads((run / "results.json").read_text())
    measured = {"split": "test", "loss": float("nan"), "perplexity": float("inf"), "accuracy": 0.5}
    (run / "results.json").write_text(json.dumps({**values, "test": measured}))
    assert "| accuracy, test | 50.00% |" in write_card(run / "final", "run").read_text()


def test_the_results_of_another_model_leave_the_card(hub, model, tmp_path):
    push(make_run(tmp_path, model), "me/it")
    assert card_of(hub).data.library_name == "symphony_hf"
    model.save_pretrained(tmp_path / "other")
    push(tmp_path / "other", "me/it", folded=True)
    card = card_of(hub)
    assert card.data.eval_results is None
    assert card.data.library_name == "transformers"


def test_the_quickstarts_report_gives_intervals(hub, model, tmp_path):
    for name in ("symphony", "plain"):
        model.save_pretrained(tmp_path / name)
    export_folded(model, tmp_path / "folded")
    shutil.copy(REPORT, tmp_path / "report.json")
    arms = json.loads(REPORT.read_text())["arms"]
    for directory, arm in ((tmp_path, "symphony"), (tmp_path / "folded", "symphony"), (tmp_path / "plain", "plain")):
        push(directory, f"me/{directory.name}")
        card = card_of(hub, f"me/{directory.name}")
        attacked = arms[arm]["attacked"]
        result = next(result for result in card.data.eval_results if "attacked" in result.metric_name)
        assert result.metric_value == attacked["estimate"]
        assert result.metric_name == f"perplexity, attacked [95%: {attacked['low']:.2f} to {attacked['high']:.2f}]"
        row = f"{attacked['estimate']:.2f} [{attacked['low']:.2f}, {attacked['high']:.2f}]"
        assert f"| perplexity, attacked [95%] | {row} |" in card.text


def test_a_runs_intervals_are_in_its_card(hub, model, tmp_path):
    run = make_run(tmp_path, model)
    stored = json.loads((run / "results.json").read_text())
    stored["test"] |= {"clean_low": 9.0, "clean_high": 11.25, "attacked_low": 20.0, "attacked_high": 30.0}
    (run / "results.json").write_text(json.dumps(stored))
    push(run, "me/it")
    assert "| perplexity, clean [95%] | 10.00 [9.00, 11.25] |" in card_of(hub).text
    assert "perplexity, attacked [95%: 20.00 to 30.00]" in {r.metric_name for r in card_of(hub).data.eval_results}


@pytest.mark.thorough
def test_the_quickstarts_model_is_as_its_recipe_left_it(hub, tmp_path, monkeypatch):
    """A run of the recipe runner on text: its documents are enough for intervals."""
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    words = [f"word{n} speaks of thing{n * 7 % 13}" for n in range(60)]
    (tmp_path / "text").mkdir()
    for number in range(250):  # a twentieth of them is held out for the test
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(words[number % 30 :]))
    settings = {"data.path": str(tmp_path / "text"), "data.vocab_size": 300, "data.block_size": 32, "max_steps": 2}
    results = run_recipe(load_recipe(RECIPES / "quickstart" / "config.yaml", {**settings, **quiet(tmp_path)}))["test"]
    push(tmp_path / "run", "me/it")
    card = card_of(hub)
    for text in ("clean", "attacked"):
        value, low, high = (f"{results[text + end]:.2f}" for end in ("", "_low", "_high"))
        assert results[f"{text}_low"] < results[text] < results[f"{text}_high"]
        assert f"| perplexity, {text} [95%] | {value} [{low}, {high}] |" in card.text
    assert f"On {results['documents']} held-out documents" in card.text
    assert "| data | text |" in card.text


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "kind", "task", "data"),
    [
        ("olmoe-7b-sft", "peft", "text-generation", "docstrings of the running Python's library"),
        ("phi3-smoe-7.4b-glue", "symphony_hf", "text-classification", "a stand-in for GLUE"),
        ("llava-smoe-4.2b", "symphony_hf", "image-text-to-text", "scikit-learn's handwritten digits"),
    ],
)
def test_a_recipes_run_is_pushed_with_its_results(recipe, kind, task, data, hub, shared_runs, tmp_path):
    folder, returned = shared_runs.smoke(RECIPES / recipe / "smoke.yaml")
    results = returned["test"]
    assert returned["origin"] == {"base_model": None, "data": None}  # both are made for the run
    push(shutil.copytree(folder / "run", tmp_path / "run"), "me/it")
    card = card_of(hub)
    assert card.data.library_name == kind
    assert f"| data | {data}" in card.text
    split = results["split"]
    expected = {f"loss, {split}": results["loss"], f"perplexity, {split}": results["perplexity"]}
    assert f"| loss, {split} | {results['loss']:.4f} |" in card.text
    if "accuracy" in results:
        value, low, high = (results["accuracy" + end] for end in ("", "_low", "_high"))
        assert f"| accuracy, {split} [95%] | {value:.2%} [{low:.2%}, {high:.2%}] |" in card.text
        expected[f"accuracy, {split} [95%: {low:.2%} to {high:.2%}]"] = value
        assert f", {results['questions']} questions" in card.text
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == expected
    assert {(r.task_type, r.dataset_split) for r in card.data.eval_results} == {(task, split)}
    assert not any(str(place) in card.content for place in (folder, tmp_path))


@pytest.mark.parametrize(("path", "names"), [(None, ["nyu-mll/glue"]), ("embedded", None)])
def test_glue_without_a_path_is_the_hubs(hub, model, tmp_path, path, names):
    run = make_run(tmp_path, model, data={"path": path, "kind": "glue", "name": "qnli"})
    stored = json.loads((run / "results.json").read_text())
    stored["test"] = {"split": "validation", "loss": 0.5, "accuracy": 0.75, "questions": 40}
    (run / "results.json").write_text(json.dumps(stored))
    push(run, "me/it")
    card = card_of(hub)
    assert card.data.datasets == names
    assert ("a stand-in for GLUE" in card.text) == (path == "embedded")


def test_text_that_was_not_attacked_has_a_card(hub, model, tmp_path):
    run = make_run(tmp_path, model)
    stored = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**stored, "test": {"clean": 10.0, "documents": 7, "note": "none"}}))
    push(run, "me/it")
    assert "| perplexity, clean | 10.00 |" in card_of(hub).text
    assert "attacked" not in card_of(hub).text


def test_a_run_without_held_out_data_has_a_card_without_results(hub, model, tmp_path):
    run = make_run(tmp_path, model, model={"path": "them/base"}, data={"path": "them/words:plain", "kind": "chat"})
    stored = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**stored, "test": {}}))
    push(run, "me/it")
    card = card_of(hub)
    assert "## Results" not in card.text
    assert card.data.eval_results is None
    assert (card.data.base_model, card.data.datasets) == ("them/base", ["them/words"])


PERPLEXITY_OF_0 = {"recipe": {"data": {"path": "x"}, "model": {"path": None}}, "test": {"clean": 0, "attacked": 1}}


@pytest.mark.parametrize(
    "results",
    ["[", "[]", "{}", '{"arms": {}}', '{"test": 3}', '{"test": {}, "recipe": {}}', json.dumps(PERPLEXITY_OF_0)],
)
def test_results_that_are_none(results, hub, checkpoint):
    (checkpoint / "results.json").write_text(results)
    with pytest.raises(PushError, match=r"results\.json"):
        push(checkpoint, "me/it")
    assert hub.requests == []


def test_a_full_disk_leaves_the_card_as_it_was(checkpoint, disk_that_fills):
    (checkpoint / "README.md").write_bytes(b"# Mine\n")
    with pytest.raises(OSError, match="No space left"):
        write_card(checkpoint, "it")
    assert (checkpoint / "README.md").read_bytes() == b"# Mine\n"
