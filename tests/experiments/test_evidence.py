"""EVIDENCE.md: it is what the command writes, and no number in it is from anywhere but a result file."""

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.experiments.ablation.point import Point
from symphony_hf.experiments.evidence.claims import find_row
from symphony_hf.experiments.evidence.page import evidence_page
from symphony_hf.experiments.evidence.results import read_results, write_evidence

RECIPES = Path(__file__).parents[2] / "recipes"
PAGE = RECIPES / "EVIDENCE.md"
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?![\w.]*\d)")


def numbers_in(value) -> Iterator[float]:
    """Yield the numbers of a result file, the lengths of its lists, and the numbers in its names and sentences."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(found.replace(",", "")) for found in NUMBER.findall(value))
    elif isinstance(value, list):
        yield float(len(value))
        for item in value:
            yield from numbers_in(item)
    else:
        for name, item in value.items():
            yield from numbers_in(name)
            yield from numbers_in(item)


def test_the_page_is_what_the_command_writes_of_the_files(tmp_path):
    result = CliRunner().invoke(
        app, ["evidence", "--folder", str(RECIPES / "evidence"), "--page", str(tmp_path / "page.md")]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.md").read_text() == PAGE.read_text()


def test_every_number_of_the_page_is_in_a_result_file():
    known = {number for values in read_results(RECIPES / "evidence").values() for number in numbers_in(values)}
    assert known
    # What is no result: the level of all intervals, the null of all ratios, a slope that theory expects.
    constants = {95.0, 1.0, -0.5}
    text = re.sub(r"`[^`]*`", "", PAGE.read_text())
    printed = {found: len(found.partition(".")[2]) for found in NUMBER.findall(text)}
    rounded = {
        digits: {round(scale * number, digits) for number in known for scale in (1, 100)} | constants
        for digits in set(printed.values())
    }
    assert [found for found, digits in printed.items() if float(found.replace(",", "")) not in rounded[digits]] == []


def intervals_in(value) -> Iterator[tuple[float, float, float]]:
    if isinstance(value, dict):
        if {"estimate", "low", "high"} <= value.keys() and value["low"] is not None:
            yield value["estimate"], value["low"], value["high"]
        elif {"mean", "low", "high"} <= value.keys() and value["low"] is not None:
            yield value["mean"], value["low"], value["high"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from intervals_in(item)


def test_every_interval_of_the_page_is_one_of_a_result_file():
    """The three numbers belong together, so that a sentence with another field's numbers is seen."""
    known = {found for values in read_results(RECIPES / "evidence").values() for found in intervals_in(values)}
    printed = re.findall(r"([+-]?\d+\.\d+)%? \[(-?\d+\.\d+), (-?\d+\.\d+)\]", PAGE.read_text())
    assert len(printed) > 100
    by_digits = {
        digits: {tuple(round(scale * number, digits) for number in found) for found in known for scale in (1, 100)}
        for digits in range(1, 7)
    }
    unknown = [found for found in printed if tuple(map(float, found)) not in by_digits[len(found[0].partition(".")[2])]]
    assert unknown == []


def test_the_paper_s_ratios_are_those_of_its_numbers():
    paper = json.loads((RECIPES / "evidence" / "paper.json").read_text())
    rows = {(row["system"], row["graph"]): row for row in paper["rows"]}
    for row in rows.values():
        if row["clean"] and row["attacked"]:
            assert row["ratio"] == round(row["attacked"] / row["clean"], 3)
        else:
            assert row["ratio"] is None
    for system, ratios in paper["graph_over_plain"].items():
        for name, ratio in ratios.items():
            plain, graph = rows[system, False][name], rows[system, True][name]
            assert ratio == (round(graph / plain, 4) if plain and graph else None)


def test_no_result_file_says_where_on_a_machine_it_was_made():
    for path in (RECIPES / "evidence").glob("*.json"):
        assert not re.search(r'"/(?:home|root|tmp|work|Users)', path.read_text()), path.name


def test_results_are_taken_in_without_paths_and_missing_ones_are_refused(tmp_path):
    folder, output = tmp_path / "evidence", tmp_path / "theory"
    folder.mkdir()
    output.mkdir()
    (folder / "paper.json").write_text((RECIPES / "evidence" / "paper.json").read_text())
    arguments = ["evidence", "--folder", str(folder), "--page", str(tmp_path / "page.md"), "--theory", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, DataError)
    assert "theory.json" in str(result.exception)
    values = json.loads((RECIPES / "evidence" / "theory.json").read_text())
    (output / "theory.json").write_text(json.dumps({**values, "output": "/somewhere"}))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads((folder / "theory.json").read_text()) == values
    assert "/somewhere" not in (tmp_path / "page.md").read_text()


@pytest.fixture
def taken_in(tmp_path):
    """A folder of evidence, and a command that takes a changed report into it."""
    folder = tmp_path / "evidence"
    shutil.copytree(RECIPES / "evidence", folder)

    def take(name, change=None, *more):
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        values = json.loads((RECIPES / "evidence" / f"{name}.json").read_text())
        file = "theory.json" if name == "theory" else "report.json"
        (output / file).write_text(json.dumps((change or dict)(values)))
        arguments = ["evidence", "--folder", str(folder), "--page", str(tmp_path / "page.md"), f"--{name}", str(output)]
        return CliRunner().invoke(app, [*arguments, *more])

    return take


REFUSED = {
    "another command's": ("theory", lambda values: {"rows": []}, "has no settings, convergence, shares"),
    "half a report": ("ablation", lambda values: {"rows": []}, "has no cells, missing, failed"),
    "pairs as axes": (
        "ablation",
        lambda values: {**values, "settings": {**values["settings"], "axes": {}}},
        "without axes: take it in by --pairs",
    ),
    "another text": (
        "pairs",
        lambda values: {**values, "settings": {**values["settings"], "text": "another"}},
        "say by --about",
    ),
    "a study without its file": (
        "pairs",
        lambda values: {**values, "command": ""},
        "its `command` is '', which names no study file",
    ),
    "pairs without a finished run": (
        "pairs",
        lambda values: {**values, "rows": []},
        "has no finished run, only 0 missing",
    ),
    "axes without a finished run": (
        "ablation",
        lambda values: {**values, "rows": [], "missing": ["smoe, graph, seed 0"]},
        "has no finished run, only 1 missing ones: finish the study first",
    ),
    "nothing a page can be made of": ("theory", lambda values: {**values, "convergence": [{}]}, "no page can be made"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_results_replace_nothing(name, taken_in, tmp_path):
    command, change, message = REFUSED[name]
    before = {path.name: path.read_bytes() for path in (tmp_path / "evidence").iterdir()}
    result = taken_in(command, change)
    assert message in str(result.exception)
    assert {path.name: path.read_bytes() for path in (tmp_path / "evidence").iterdir()} == before
    assert not (tmp_path / "page.md").exists()


def test_a_study_of_characters_without_a_finished_run_replaces_nothing(tmp_path):
    folder, output = tmp_path / "evidence", tmp_path / "output"
    shutil.copytree(RECIPES / "evidence", folder)
    output.mkdir()
    before = (folder / "characters-short.json").read_bytes()
    (output / "report.json").write_text(json.dumps({**json.loads(before), "rows": [], "cells": [], "machines": []}))
    with pytest.raises(DataError, match=r"--characters: `.*report.json` has no finished run"):
        write_evidence(folder, tmp_path / "page.md", characters=str(output))
    assert (folder / "characters-short.json").read_bytes() == before


def test_replaced_files_are_named(taken_in, tmp_path):
    page, pairs = tmp_path / "page.md", tmp_path / "evidence" / "pairs.json"
    assert taken_in("pairs").output == f"Written to {page}, {pairs} (replaced)\n"
    pairs.unlink()
    about = ("--about", "On some text.")
    assert taken_in("pairs", None, *about).output == f"Written to {page} (replaced), {pairs}\n"


def test_the_regime_of_a_study_of_words_is_said(taken_in, tmp_path):
    def tuned(values):
        rates = {"learning_rates": [0.001, 0.003], "tuning_seeds": [7, 8], "tokenizer": "words"}
        regime = {"pretraining_steps": 500, "contamination": 0.1, "text_vocab_size": 7654}
        tuning = [{"label": "smoe, graph", "losses": {"0.001": 1.25, "0.003": 2.5}, "chosen": 0.001}]
        return {**values, "settings": {**values["settings"], **rates, **regime}, "tuning": tuning}

    assert taken_in("pairs", tuned).exit_code == 0
    page = (tmp_path / "page.md").read_text()
    pairs = page[page.index("## The three pairs") : page.index("## The axes")]
    assert "Each run from a plain model, or for a control one of its own kind, after 500 steps on the first" in pairs
    assert "10% of which were replaced at random once and scored like the rest" in pairs
    assert "Adam, each form at the best of 2 learning rates for held-out training text" in pairs
    assert "all at a learning rate of" not in pairs
    assert "a vocabulary of 7,654 words" in pairs
    assert "### Learning rates" in pairs
    assert "| smoe, graph | 1.2500 | 2.5000 | 0.001 |" in pairs
    # A study of an earlier version has one rate, and is known by its recipe's maximum.
    axes = page[page.index("## The axes") :]
    assert "all at a learning rate of 0.003, which was not tuned for each form" in axes
    assert "a vocabulary of at most 8,192 words" in axes


def test_the_graph_is_credited_with_what_it_adds_to_its_own_base(taken_in, tmp_path):
    """A base with a dense router gradient, better than the plain system, and worse than itself without a graph."""
    values = {"estimate": 0.5, "low": 0.4, "high": 0.6, "num_seeds": 3, "confidence": 0.95}

    def dense(report, compared=True):
        report["settings"]["base"]["router_gradient"] = "dense"
        for row in report["rows"]:
            if row["label"] == "smoe, graph":
                row["point"]["router_gradient"] = "dense"
                measures = row["against_plain"]
                row["against_plain"] = {name: {**values, "verdict": "better"} for name in measures}
                row["against_no_graph"] = {name: {**values, "verdict": "worse"} for name in measures}
                if not compared:
                    del row["against_no_graph"]
        return report

    assert taken_in("pairs", dense).exit_code == 0
    page = (tmp_path / "page.md").read_text()
    assert "Lower clean perplexity with the graph**: SMoE refuted (0.5000 [0.4000, 0.6000])" in page
    assert "clean against the plain system" in page[page.index("## The three pairs") :]
    assert taken_in("pairs", lambda report: dense(report, compared=False)).exit_code == 0
    assert "Lower clean perplexity with the graph**: SMoE not run" in (tmp_path / "page.md").read_text()


def test_the_page_says_once_what_forms_are_compared_with():
    """Not all forms of the page differ from the plain system by their graph alone."""
    intro = PAGE.read_text().partition("## Summary")[0]
    assert "A form that differs by its graph alone is compared with the same system without a graph." in intro
    assert "Forms that differ in more than their graph are compared with the plain system" in intro
    assert intro.count("compared with") == 2
    assert "has no damage added to its batches" in intro


def test_the_sentence_of_a_text_stays_with_it(taken_in, tmp_path):
    about = json.loads((RECIPES / "evidence" / "pairs.json").read_text())["about"]
    assert taken_in("pairs", lambda values: {**values, "about": ""}).exit_code == 0
    assert json.loads((tmp_path / "evidence" / "pairs.json").read_text())["about"] == about
    change = REFUSED["another text"][1]
    assert taken_in("pairs", change, "--about", "On another text.").exit_code == 0
    assert "On another text. The test text has" in (tmp_path / "page.md").read_text()


def test_a_page_that_cannot_be_written_is_refused_before_any_result_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"evidence: .* is a folder"):
        write_evidence(RECIPES / "evidence", tmp_path, theory="nowhere")


def test_a_plain_row_is_neither_a_control_nor_a_form_without_a_graph():
    plain = dataclasses.asdict(Point().plain)
    others = (
        {"control": "frozen_routers"},
        {"damage": 0.1},
        {"router_gradient": "dense"},
        {"selection": "conditional"},
    )
    rows = [{"point": {**plain, **change}} for change in (*others, {"system": "glam"}, {})]
    ablation = {"rows": rows, "settings": {"base": dataclasses.asdict(Point())}}
    assert find_row(ablation, "smoe", graph=False) is rows[-1]
    assert find_row(ablation, "glam", graph=False) is rows[-2]
    assert find_row(ablation, "smoe", graph=True) is None


def test_a_page_of_the_paper_alone_claims_nothing():
    page = evidence_page({"paper": read_results(RECIPES / "evidence")["paper"]})
    assert "Not run" in page
    assert "confirmed" not in page


@pytest.mark.parametrize("verdict", ["better", "worse", "not distinguishable"])
def test_what_did_not_help_is_said(verdict):
    interval = {"estimate": 0.5, "low": 0.4, "high": 0.6, "num_seeds": 3, "confidence": 0.95}
    measures = ("clean", "attacked", "ratio", "routing_kept", "load_entropy")
    base = {"system": "smoe", "graph": "ema", "strength": 1.0}
    plain = {**base, "graph": "identity", "strength": 0.0}
    row = {**dict.fromkeys(measures, interval), "seeds": [0, 1, 2], "start_left": None}
    against = {name: {**interval, "verdict": verdict} for name in measures}
    settings = {
        **{"base": base, "hidden_size": 64, "seeds": [0, 1, 2], "learning_rate": 0.003},
        **dict.fromkeys(("tokens", "steps", "rows", "block_size", "vocab_size"), 8),
        **dict.fromkeys(("test_tokens", "attacked_tokens", "reached_tokens"), 8),
    }
    ablation = {
        "rows": [
            {**row, "label": "smoe, no graph", "point": plain},
            {**row, "label": "smoe, graph", "point": base, "against_plain": against, "start_left": 0.25},
        ],
        **{
            "cells": [{"tokens_per_cpu_second": 5000.0, "parameters": n} for n in (9000, 7000)],
            "failed": {"glam, graph, seed 7": "exit code 1"},
        },
        **{
            "missing": ["glam, graph, seed 0", "glam, graph, seed 2", "glam, graph, seed 7"],
            "machines": [{"machine": "x", "symphony_hf": "1", "torch": t, "transformers": "5"} for t in ("2", "3")],
            "command": "symphony ablate STUDY",
            "about": "On some text.",
            "settings": settings,
        },
    }
    paper = read_results(RECIPES / "evidence")["paper"]
    page = evidence_page({"paper": paper, "ablation": ablation})
    # Pairs of their own take the pairs' place, and the axes stay.
    other = {
        **ablation,
        "rows": [{**row, "seeds": [0]} for row in ablation["rows"]],
        "command": "symphony ablate PAIRS",
    }
    both = evidence_page({"paper": paper, "ablation": ablation, "pairs": other})
    assert both.index("`symphony ablate PAIRS`") < both.index("## The axes") < both.index("`symphony ablate STUDY`")
    assert "PAIRS" not in page
    word = {"better": "confirmed", "worse": "refuted", "not distinguishable": "not confirmed"}[verdict]
    assert f"Lower clean perplexity with the graph**: SMoE {word} (0.5000 [0.4000, 0.6000])" in page
    assert "XMoE not run" in page
    assert "- not run: glam, graph, seeds 0, 2\n- failed: glam, graph, seed 7, exit code 1\n" in page
    assert "7,000 to 9,000 parameters" in page
    assert (
        "on one core of a CPU (x, symphony_hf 1, torch 2, transformers 5; x, symphony_hf 1, torch 3, transformers 5)"
        in page
    )
    assert "initial identity in the final graph: `smoe, graph` 25.0%." in page
    assert "Other forms of the graph**, against no graph: not run." in page
    # A form that is told apart is named, the base's own is none of them, and a system that the paper lacks has a row.
    point = {**base, "strength": 0.5}
    ablation["rows"].append({**row, "label": "smoe, strength 0.5", "point": point, "against_plain": against})
    ablation["rows"].append({**row, "label": "smoothsmoe, no graph", "point": {**plain, "system": "smoothsmoe"}})
    page = evidence_page({"paper": paper, "ablation": ablation})
    assert "of 1, clean perplexity better with " in page
    assert page.count("with `smoe, strength 0.5`") == (0 if verdict == "not distinguishable" else 2)
    assert ("with `smoe, graph`, `smoe, strength 0.5`; the defaults should follow" in page) == (verdict == "better")
    assert ("None of 2 forms is better than no graph" in page) == (verdict != "better")
    assert ("although clean perplexity is worse than without a graph with `smoe, graph`" in page) == (
        verdict == "worse"
    )
    assert "Control" not in page
    ablation["rows"][1]["against_shuffled"] = against
    wanted = (
        "**Control**: `smoe, graph` against itself with its experts shuffled: clean perplexity 0.5000 [0.4000, "
        f"0.6000], {verdict}; routing stability under attack +50.00 [40.00, 60.00] points, {verdict}."
    )
    page = evidence_page({"paper": paper, "ablation": ablation})
    assert wanted in page
    # Another system's form, which only an axis has, is among the axes; its base point is among the pairs.
    axes = page[page.index("## The axes") :]
    assert "| smoe, graph |" in axes
    assert "| smoothsmoe, no graph |" not in axes
    ablation["rows"].append(
        {**ablation["rows"][2], "label": "xmoe, strength 0.5", "point": {**point, "system": "xmoe"}}
    )
    page = evidence_page({"paper": paper, "ablation": ablation})
    assert "| xmoe, strength 0.5 |" in page[page.index("## The axes") :]
    assert "| smoothsmoe, no graph | not known, not known, not known |" in page
    assert "| smoothsmoe, graph | not known, not known, not known | not known, not known | not run |" in page


def test_a_study_of_characters_replaces_that_of_the_same_file(tmp_path):
    folder, output = tmp_path / "evidence", tmp_path / "output"
    shutil.copytree(RECIPES / "evidence", folder)
    output.mkdir()
    study = json.loads((folder / "characters-short.json").read_text())
    arguments = ["evidence", "--folder", str(folder), "--page", str(tmp_path / "page.md"), "--characters", str(output)]
    blind = {**study, "sight": {**study["sight"], "concludes": False}, "output": "/somewhere"}
    (output / "report.json").write_text(json.dumps(blind))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "page.md").read_text().count("**Nothing can be concluded**") == 2
    other = {**study, "command": shlex.join(["symphony", "ablate", "/some where/pretraining.yaml", "--output", "DIR"])}
    (output / "report.json").write_text(json.dumps(other))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    names = {path.stem for path in folder.glob("characters-*")}
    assert names == {path.stem for path in RECIPES.glob("evidence/characters-*")} | {"characters-pretraining"}
    assert "`symphony ablate pretraining.yaml --output DIR`" in (tmp_path / "page.md").read_text()
    assert "/some where" not in (folder / "characters-pretraining.json").read_text()
    (output / "report.json").write_text(json.dumps({**study, "settings": {**study["settings"], "tokenizer": "words"}}))
    assert "is of a study of words" in str(CliRunner().invoke(app, arguments).exception)


def test_a_study_without_runs_is_left_out():
    paper = read_results(RECIPES / "evidence")["paper"]
    empty = {"rows": [], "cells": [], "missing": ["smoe, graph, seed 0"], "failed": {}, "settings": {}}
    assert evidence_page({"paper": paper, "ablation": empty}) == evidence_page({"paper": paper})
