"""The quickstart, scaled down to seconds: its files exist, and its numbers are those of the saved models."""

import dataclasses
import json
import math
import shlex
from types import SimpleNamespace

import pytest
import torch
from models import assert_folded
from small_runs import RECIPE, quickstart_settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from symphony_hf import ConfigError, DataError, EvaluationError, expert_graphs, is_symphonized
from symphony_hf.cli import app, main
from symphony_hf.data.corpus import load_corpus
from symphony_hf.diagnostics import plots
from symphony_hf.evaluation.attacks.word_swap import attack
from symphony_hf.evaluation.report.quickstart import print_report, write_report
from symphony_hf.recipe import load_recipe
from symphony_hf.training import quickstart as quickstart_module
from symphony_hf.training import quickstart_checks
from symphony_hf.training.arguments import training_arguments
from symphony_hf.training.quickstart import QuickstartSettings, run_quickstart
from symphony_hf.training.quickstart_checks import refuse_differences


@pytest.fixture(scope="module")
def quickstart(shared_runs):
    folder, report = shared_runs.quickstart()
    assert " " in str(folder)  # which a command line quotes
    return quickstart_settings(folder), report, folder / "out"


def test_everything_promised_is_written(quickstart):
    _, report, output = quickstart
    names = {path.name for path in output.iterdir()}
    assert {"base", "plain", "symphony", "folded", "report.md", "report.json"} <= names
    for picture in ("graphs.png", "network.png", "curves.png", "comparison.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "report.json").read_text())["arms"] == report["arms"]
    page = (output / "report.md").read_text()
    assert f"{report['arms']['symphony']['clean']['estimate']:.2f}" in page
    assert report["comparisons"]["clean"]["verdict"] in page


def test_the_models_are_what_the_report_says(quickstart):
    _, report, output = quickstart
    load = AutoModelForCausalLM.from_pretrained
    symphony, plain, folded, base = (load(output / name) for name in ("symphony", "plain", "folded", "base"))
    assert [is_symphonized(model) for model in (symphony, plain, folded, base)] == [True, False, False, False]
    ids = torch.randint(3, 290, (2, 20))
    assert_folded(folded(ids).logits, symphony(ids).logits)
    assert not torch.equal(plain(ids).logits, symphony(ids).logits)
    assert not torch.equal(plain(ids).logits, base(ids).logits)
    assert all((graph - torch.diag(graph.diagonal())).sum() > 0 for graph in expert_graphs(symphony).values())
    assert report["checks"]["reload_max_difference"] == 0
    assert report["checks"]["folded_max_difference"] <= 1e-5 * max(1.0, report["checks"]["max_logit"])


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["clean", "attacked"])
def test_perplexities_are_those_of_the_saved_models(quickstart, kind):
    """Recomputed naively from the checkpoints and the corpus, one window at a time."""
    settings, report, output = quickstart
    found = load_corpus(settings.data).test
    documents = [found[number * len(found) // settings.documents] for number in range(settings.documents)]
    if kind == "attacked":
        documents = attack(documents, rate=settings.attack_rate, seed=settings.seed)
    for name in ("plain", "symphony"):
        model = AutoModelForCausalLM.from_pretrained(output / name)
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        nll, count = 0.0, 0
        for document in documents:
            ids = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for start in range(0, len(ids), settings.block_size):
                window = torch.tensor([ids[start : start + settings.block_size]])
                if window.shape[1] < 2:
                    continue
                with torch.no_grad():
                    log_probabilities = model(window).logits[0, :-1].log_softmax(-1)
                nll -= float(log_probabilities.gather(1, window[0, 1:, None]).sum())
                count += window.shape[1] - 1
        # Padding and batching move float32 sums by rounding.
        assert report["arms"][name][kind]["estimate"] == pytest.approx(math.exp(nll / count), rel=1e-4)


def test_the_table_says_where_the_results_are(quickstart, capsys):
    _, report, output = quickstart
    print_report(report)
    printed = capsys.readouterr().out
    assert str(output) in printed.replace("\n", "")
    assert "seconds per step" in printed
    assert "routing stability" in printed


def test_too_few_documents_are_refused_before_the_training(quickstart, tmp_path):
    settings, _, _ = quickstart
    few = dataclasses.replace(settings, documents=9, output=str(tmp_path / "out"))
    with pytest.raises(DataError, match="9 held-out documents"):
        run_quickstart(few)
    assert not (tmp_path / "out").exists()


def test_a_quickstart_in_a_used_folder_does_not_keep_the_report_of_other_models(quickstart, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    output = tmp_path / "out"
    (output / "base").mkdir(parents=True)
    for name in ("report.md", "notes.md"):
        (output / name).write_text("of before")
    (output / "report.json").write_text('{"versions": {"symphony_hf": "0.1.0"}}')
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart_module, "_pretrain", killed)
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(dataclasses.replace(quickstart[0], output=str(output)))
    assert {path.name for path in output.iterdir()} == {"base", "notes.md"}
    (output / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has `report.json`, which no run of symphony_hf wrote"):
        run_quickstart(dataclasses.replace(quickstart[0], output=str(output)))


def test_a_full_disk_leaves_the_page_as_it_was(quickstart, tmp_path, monkeypatch, disk_that_fills):
    for name in ("plot_comparison", "plot_copies", "plot_graphs", "plot_expert_network"):
        monkeypatch.setattr(plots, name, lambda *arguments: None)
    (tmp_path / "report.md").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_report(quickstart[1], {}, quickstart[1]["curves"], tmp_path)
    assert (tmp_path / "report.md").read_bytes() == b"old"


def test_the_command_of_the_report_gives_its_settings(quickstart):
    settings, report, _ = quickstart
    words = shlex.split(report["command"])
    assert words[:2] == ["symphony", "quickstart"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--data"] == settings.data
    assert " " in settings.data
    assert given["--finetune_steps"] == "4"
    assert "--seed" not in given


def test_the_committed_report_is_of_the_recipe():
    report = json.loads((RECIPE.parent / "report.json").read_text())
    assert report["settings"] == dataclasses.asdict(QuickstartSettings())
    assert report["model"] == load_recipe(RECIPE).model.config


def test_the_command_runs_the_recipe(tmp_path):
    recipe, settings = load_recipe(RECIPE), QuickstartSettings()
    run = load_recipe(RECIPE, settings.overrides(tmp_path, settings.finetune_steps))
    assert (run.model, run.symphony, run.data, run.eval) == (recipe.model, recipe.symphony, recipe.data, recipe.eval)
    added = {"eval_strategy": "steps", "eval_steps": 60, "dataloader_pin_memory": False}
    assert run.train == recipe.train | added


CHECKS = {"reload_max_difference": 0.0, "folded_max_difference": 8e-5, "max_logit": 20.0, "folded_same_choices": 1.0}


@pytest.mark.parametrize(
    "wrong",
    [{"max_logit": 2.0}, {"reload_max_difference": 1e-9}, {"folded_same_choices": 0.99}, {"max_logit": float("nan")}],
)
def test_saved_forms_may_differ_by_rounding_of_the_largest_logit(wrong):
    refuse_differences(CHECKS)
    with pytest.raises(EvaluationError, match="does not compute what the model does"):
        refuse_differences({**CHECKS, **wrong})


class Outputs(torch.nn.Module):
    """A model as far as its outputs are compared."""

    def __init__(self, logits, router_logits):
        super().__init__()
        self.outputs = SimpleNamespace(logits=logits, router_logits=router_logits)

    def forward(self, ids, **settings):
        return self.outputs


def test_a_near_tie_that_rounding_decides_is_not_a_difference_of_the_logits(tmp_path, monkeypatch):
    """In one of two windows, the second of three tokens chooses otherwise; the logits from there on do not count."""
    logits, routers = torch.ones(2, 3, 5), torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(6, 1)
    moved, flipped = logits.clone(), routers.clone()
    moved[1, 1:] += 1.0
    moved[0, 2] += 1e-6
    flipped[4] = torch.tensor([3.0, 0.0, 1.0, 0.0])
    saved = {"symphony": Outputs(logits, ()), "folded": Outputs(moved, (routers, flipped))}
    monkeypatch.setattr(quickstart_checks, "export_folded", lambda model, folder: None)
    monkeypatch.setattr(quickstart_checks, "folded_parameters", lambda model: [])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda folder: saved[folder.name])
    windows = {name: [torch.arange(3)] for name in "ab"}
    checks = quickstart_checks.compare_saved_forms(Outputs(logits, (routers, routers)), windows, tmp_path, top_k=2)
    assert checks["folded_max_difference"] == pytest.approx(1e-6, rel=0.1)  # as float32 has it beside 1
    assert checks["folded_same_choices"] == pytest.approx(11 / 12)
    assert checks["max_logit"] == 1.0


@pytest.mark.thorough
def test_the_report_is_written_before_a_difference_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    wrong = {**CHECKS, "folded_same_choices": 0.5}
    monkeypatch.setattr(quickstart_module, "compare_saved_forms", lambda *arguments: wrong)
    with pytest.raises(EvaluationError, match="does not compute what the model does"):
        run_quickstart(quickstart_settings(tmp_path))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checks"] == wrong
    assert (tmp_path / "out" / "report.md").exists()


def test_one_gpu_of_several_is_used(tmp_path, monkeypatch):
    """Otherwise Trainer would use them all, and train batches of another size."""
    used = []

    def train(model, data, validation, arguments, callbacks):
        callbacks[0].seconds.append(0.0)
        used.append(arguments.n_gpu)
        return SimpleNamespace(state=SimpleNamespace(log_history=[]))

    def arguments_of_four(recipe):
        arguments = training_arguments(recipe)
        arguments._n_gpu = 4
        return arguments

    monkeypatch.setattr(quickstart_module, "train", train)
    monkeypatch.setattr(quickstart_module, "training_arguments", arguments_of_four)
    recipe = load_recipe(RECIPE, QuickstartSettings().overrides(tmp_path, 1))
    quickstart_module._train(None, recipe, torch.zeros(1, 2), torch.zeros(1, 2))
    assert used == [1]


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="`finetune_steps` must be at least 1"):
        QuickstartSettings(finetune_steps=0)
    with pytest.raises(ConfigError, match="`seed` must be between"):
        QuickstartSettings(seed=-1)


@pytest.mark.parametrize("command", [[], ["quickstart"], ["train"], ["bench"]])
def test_help_has_examples(command):
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "symphony" in result.output.lower()
    assert not command or "Example" in result.output


def test_the_command_says_errors_in_one_line(monkeypatch, capsys, tmp_path):
    models = "olmoe-1b-7b,mixtral-8x8b"
    monkeypatch.setattr("sys.argv", ["symphony", "bench", "--models", models, "--output", str(tmp_path / "b")])
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # so that the allocator of these tests stays as it is
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: bench: unknown model `mixtral-8x8b`; did you mean `mixtral-8x7b`?\n"
