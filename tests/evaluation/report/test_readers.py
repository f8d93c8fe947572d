"""Detection of the command that wrote a folder, and errors for other and incomplete folders."""

import dataclasses
import itertools
import json
import shlex
import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from symphony_hf.errors import GraphError, ReportError
from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.evaluation.report.quickstart import print_report
from symphony_hf.evaluation.report.read_training import read_run_graphs
from symphony_hf.evaluation.report.runs import as_interval
from symphony_hf.evaluation.statistics import Interval


def rewrite(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.fixture
def copy(tmp_path):
    def make(folder):
        return shutil.copytree(folder, tmp_path / folder.name)

    return make


def test_each_kind_is_recognised(folders):
    runs = read_runs(folders)
    assert [run.kind for run in runs] == ["quickstart", "training run", "evaluation", "routing diagnostics"]
    assert all(run.findings and run.about for run in runs)
    assert [bool(run.command) for run in runs] == [True] * 4


def test_an_evaluation_s_command_line_gives_its_settings(evaluated):
    (run,) = read_runs([evaluated])
    assert run.about.startswith("symphony against plain, ")
    words = shlex.split(run.command)
    assert words[:2] == ["symphony", "eval"]
    assert words[words.index("--attack") + 1] == "aaa,keyboard"
    assert words[words.index("--severity") + 1] == "1,3"
    assert words[words.index("--block_size") + 1] == "32"
    assert words.count("--against") == 1
    assert words[words.index("--against") + 1].endswith("/plain")


def test_a_command_line_is_one_for_a_shell(routed, copy):
    folder = copy(routed)
    strange = {"model": "my models/it's", "attacks": [], "against": ["a b", "c"], "text_column": "$text"}
    rewrite(folder / "result.json", lambda result: result["settings"].update(strange))
    (run,) = read_runs([folder])
    words = shlex.split(run.command)
    assert words[:3] == ["symphony", "routing", "my models/it's"]
    given = list(itertools.pairwise(words))
    for pair in (
        ("--attack", "none"),
        ("--against", "a b"),
        ("--against", "c"),
        ("--text_column", "$text"),
        ("--severity", "1"),
    ):
        assert pair in given
    assert "--drop_first" in words


def test_a_setting_of_none_that_is_not_the_default_is_given(evaluated, routed, copy):
    for folder, names in ((copy(evaluated), ["documents"]), (copy(routed), ["documents", "words"])):
        rewrite(folder / "result.json", lambda result, names=names: result["settings"].update(dict.fromkeys(names)))
        (run,) = read_runs([folder])
        given = list(itertools.pairwise(shlex.split(run.command)))
        for name in names:
            assert (f"--{name}", "all") in given
            assert run.settings[name] == "all"
        assert "--revision" not in run.command


def test_an_interval_keeps_its_null_and_p_value():
    interval = Interval(0.5, 0.2, 0.8, 0.95, 12, 0, 0.0, 0.2)
    assert as_interval(dataclasses.asdict(interval)) == interval
    assert interval.verdict() == "not distinguishable"  # by the exchange test alone
    level = dataclasses.asdict(dataclasses.replace(interval, null=None, p_value=None))
    assert as_interval({name: value for name, value in level.items() if value is not None}).p_value is None


def test_one_model_alone_has_no_verdict(evaluated, copy):
    folder = copy(evaluated)

    def alone(result):
        del result["comparisons"], result["models"]["against"]
        result["settings"]["against"] = None

    rewrite(folder / "result.json", alone)
    (run,) = read_runs([folder])
    assert run.comparisons == []
    assert len(run.findings) == 3  # clean, and two attacks
    assert "; against clean input " in run.findings[1]


def test_two_revisions_of_a_model_have_two_names(evaluated, copy):
    folder = copy(evaluated)
    rewrite(folder / "result.json", lambda result: result["settings"].update(against=result["settings"]["model"]))
    (run,) = read_runs([folder])
    assert len({level.model for level in run.levels}) == 2


def test_losses_of_an_older_run_are_those_of_its_newest_checkpoint(trained, copy):
    folder = copy(trained)
    rewrite(folder / "results.json", lambda results: results.pop("losses"))
    assert read_runs([folder])[0].curves[""]["train"] == []
    (folder / "checkpoint-2").mkdir()
    history = [{"step": 1, "loss": 5.0}, {"step": 2, "eval_loss": 4.0}, {"step": 2, "loss": 4.5}]
    (folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_runs([folder])[0].curves[""]["train"] == [(1.0, 5.0), (2.0, 4.5)]


def test_the_file_that_is_to_blame_is_named(trained, copy):
    folder = copy(trained)
    rewrite(folder / "results.json", lambda results: results.pop("losses"))
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"log_hist')
    with pytest.raises(ReportError, match=r"trainer_state\.json` is no JSON") as caught:
        read_runs([folder])
    assert "results.json" not in str(caught.value)


def test_a_quickstarts_names_are_printed_letter_by_letter(quickstart):
    report = json.loads((quickstart / "report.json").read_text())
    report["settings"]["output"] = "runs/[lr1]/[/x]"
    page = StringIO()
    print_report(report, Console(width=300, file=page))
    assert "runs/[lr1]/[/x] (start with report.md)" in page.getvalue()


def test_a_comparison_says_its_unit(evaluated, copy):
    folder = copy(evaluated)
    for unit in ("token", "word"):
        rewrite(folder / "result.json", lambda result, unit=unit: result["comparisons"].update(unit=unit))
        (run,) = read_runs([folder])
        compared = {comparison.what for comparison in run.comparisons}
        level, change = f"ratio of perplexities per {unit}", f"difference of attacked / clean per {unit}"
        assert compared == {level, change, "ratio of perplexities per token, on untouched tokens"}
    assert any("do not compare" in sentence for sentence in run.findings)


def test_the_count_of_verdicts_is_that_of_the_comparisons(evaluated):
    (run,) = read_runs([evaluated])
    assert run.findings[-1].endswith(f"there are {len(run.comparisons)}.")


@pytest.mark.parametrize(
    ("kind", "path", "described"),
    [
        ("glue", None, "GLUE qnli"),
        ("glue", "embedded", "embedded glue data"),
        ("glue", "tables/qnli", "tables/qnli"),
        ("chat", None, "embedded chat data"),
    ],
)
def test_data_without_a_path_is_embedded_but_for_glue(trained, copy, kind, path, described):
    folder = copy(trained)
    change = {"kind": kind, "path": path, "name": "qnli"}
    rewrite(folder / "results.json", lambda results: results["recipe"]["data"].update(change))
    assert read_runs([folder])[0].about.endswith(f" steps on {described}")


def test_text_that_was_not_attacked_has_no_level_for_it(trained, copy):
    folder = copy(trained)

    def leave_out(results):
        results["test"] = {name: value for name, value in results["test"].items() if name.startswith("clean")}
        results["test"] |= {"documents": 12, "note": "not attacked: no spaces"}

    rewrite(folder / "results.json", leave_out)
    (run,) = read_runs([folder])
    assert [level.text for level in run.levels] == ["clean"]
    assert run.findings[0].endswith(" on 12 held-out documents.")
    assert run.findings[1] == "Note: not attacked: no spaces."


def test_a_quickstarts_page_asks_for_no_import(quickstart):
    """Where the package is installed, its checkpoints load without one."""
    page = (quickstart / "report.md").read_text()
    assert "loads where symphony_hf is installed" in page
    assert "import symphony_hf" not in page


def test_windows_that_overlap_are_no_documents(trained, copy):
    folder = copy(trained)
    assert " held-out documents; " in read_runs([folder])[0].findings[0]
    rewrite(folder / "results.json", lambda results: results["recipe"]["eval"].update(context=8))
    (run,) = read_runs([folder])
    assert " windows; " in run.findings[0]
    assert [level.unit for level in run.levels] == ["windows"] * len(run.levels)


def test_seconds_a_step_are_left_out_where_a_run_was_resumed(trained, copy):
    folder = copy(trained)
    assert read_runs([folder])[0].costs[0].seconds_per_step > 0
    rewrite(folder / "results.json", lambda r: r["recipe"]["train"].update(resume_from_checkpoint=True))
    assert read_runs([folder])[0].costs[0].seconds_per_step is None


def test_memory_is_read_where_trainer_measured_it(trained, copy):
    folder = copy(trained)
    rewrite(folder / "results.json", lambda r: r["train"].update(train_mem_gpu_peaked_delta=2**30))
    assert read_runs([folder])[0].costs[0].memory == {"mem gpu peaked delta": 2**30}


def test_an_evaluation_may_be_of_accuracy(evaluated, copy):
    folder = copy(evaluated)

    def accuracy(result):
        share = {"estimate": 0.75, "low": 0.5, "high": 0.9, "confidence": 0.95, "num_documents": 12, "seed": 0}
        less = share | {"estimate": -0.25, "low": -0.3, "high": -0.2, "null": 0.0}
        f1 = share | {"estimate": 0.6}
        row = {"attack": "aaa", "severity": 1, "accuracy": share, "difference": less}
        row |= {"also": {"F1": {"level": f1, "difference": less | {"estimate": -0.3}}}}
        model = {"clean": {"accuracy": share, "also": {"F1": {"level": f1}}}, "attacks": [row]}
        result["models"] = {"model": model, "against": model}
        even = less | {"estimate": 0.0, "high": 0.1, "verdict": "not distinguishable"}
        compared = {"accuracy": even, "difference": even, "also": {"F1": {"level": even, "difference": even}}}
        attacks = [{"attack": "aaa", "severity": 1, **compared}]
        result["comparisons"] = {"clean": even, "also": {"F1": even}, "attacks": attacks}
        result["measure"] = {"level": "accuracy", "change": "difference", "lower_is_better": False, "also": ["F1"]}

    rewrite(folder / "result.json", accuracy)
    (run,) = read_runs([folder])
    assert [(level.metric, level.value) for level in run.levels] == [("accuracy", 0.75), ("F1", 0.6)] * 2
    attacks = [(row.metric, row.value.estimate, row.change.estimate) for row in run.attacks]
    assert attacks == [("accuracy", 0.75, -0.25), ("F1", 0.6, -0.3)] * 2
    assert [(one.text, one.what, one.headline) for one in run.comparisons] == [
        ("clean", "difference of accuracies", True),
        ("clean", "difference of F1", False),
        ("aaa, severity 1", "difference of accuracies", True),
        ("aaa, severity 1", "difference of attacked - clean", True),
        ("aaa, severity 1", "difference of F1", False),
        ("aaa, severity 1", "difference of attacked - clean, F1", False),
    ]
    rewrite(folder / "result.json", lambda result: result.pop("comparisons"))
    assert read_runs([folder])[0].findings[0] == "On clean input, accuracy 75.00% [50.00%, 90.00%]."


def test_a_run_without_graphs_has_none(trained, copy):
    folder = copy(trained)
    file = folder / "final" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".symphony." not in name}
    save_file(tensors, file)
    assert read_runs([folder])[0].graphs == {}


@pytest.mark.parametrize("damage", ["truncated", "no graph"])
def test_a_damaged_graph_is_an_error(trained, copy, damage):
    folder = copy(trained)
    file = folder / "final" / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(".symphony.adjacency"))
        save_file({**tensors, name: torch.full((16, 16), -1.0)}, file)
    with pytest.raises(GraphError, match="model.safetensors" if damage == "truncated" else "not usable"):
        read_runs([folder])


def test_a_damaged_graph_is_an_error_whatever_its_folder_is_called(tmp_path):
    model = tmp_path / "no tensor is named `*.symphony.adjacency`"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(GraphError, match="is it truncated"):
        read_run_graphs(model)


def make_empty(folder):
    folder.mkdir()


def make_weights(folder):
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")


def make_cells(folder):
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / "clean-0123.npz").write_bytes(b"")


def make_checkpoint(folder):
    (folder / "checkpoint-10").mkdir(parents=True)


def make_half(folder):
    folder.mkdir()
    (folder / "results.json").write_text('{"recipe": {"mod')


def make_other(folder):
    folder.mkdir()
    (folder / "results.json").write_text('{"accuracy": 0.5}')


def make_list(folder):
    folder.mkdir()
    (folder / "report.json").write_text("[1, 2]")


def make_two(folder):
    make_other(folder)
    (folder / "report.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_empty, "is not a run of symphony_hf: expected the output folder of `symphony train`"),
        (make_weights, "an unfinished quickstart: run it again"),
        (make_cells, "an unfinished evaluation: the same `symphony eval` continues it"),
        (make_checkpoint, "an unfinished training run: continue it with --resume_from_checkpoint"),
        (make_half, "results.json` is no JSON, or half of one"),
        (make_other, "results.json` is not a result of symphony_hf: it has no `recipe`"),
        (make_list, "report.json`: expected an object, got list"),
        (make_two, "has results.json and report.json, results of two commands"),
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is a file: expected"),
    ],
)
def test_folders_without_a_run_are_refused(tmp_path, make, message):
    make(tmp_path / "folder")
    with pytest.raises(ReportError) as caught:
        read_runs([tmp_path / "folder"])
    assert message in str(caught.value)
    assert str(tmp_path / "folder") in str(caught.value)


def test_part_of_a_run_is_refused_with_its_folder(trained):
    for part in (trained / "final", trained / "results.json"):
        with pytest.raises(ReportError, match=f"give its folder, `{trained}`"):
            read_runs([part])
    with pytest.raises(ReportError, match="no run was given"):
        read_runs([])


@pytest.mark.parametrize("key", ["recipe", "test", "validation", "parameters", "versions"])
def test_a_missing_key_is_named(trained, copy, key):
    folder = copy(trained)
    rewrite(folder / "results.json", lambda results: results.pop(key))
    with pytest.raises(ReportError, match=key):
        read_runs([folder])


def test_values_of_another_kind_are_refused(evaluated, copy):
    folder = copy(evaluated)
    rewrite(folder / "result.json", lambda r: r["models"]["model"]["clean"]["perplexity"].update(low="much"))
    with pytest.raises(ReportError, match="does not have what this version of symphony_hf writes"):
        read_runs([folder])


def test_an_invalid_picture_is_refused(routed, copy, tmp_path):
    from symphony_hf.evaluation.report.page import write_page

    folder = copy(routed)
    (folder / "graphs.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(ReportError, match=r"graphs\.png` is not a PNG"):
        write_page(read_runs([folder]), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
