"""The page: what it says is what the runs' files say, and nothing on it is fetched or run but its own."""

import json
import shutil
from importlib import resources

import pytest
import torch
from parsed import Parsed
from safetensors.torch import load_file
from typer.testing import CliRunner

import symphony_hf.evaluation.report
from symphony_hf.cli import app
from symphony_hf.errors import ReportError
from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.evaluation.report.page import write_page
from symphony_hf.evaluation.report.tables import four_digits, show_interval, text
from symphony_hf.evaluation.statistics import Interval

pytestmark = pytest.mark.thorough

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page)


def test_every_section_is_there_and_can_be_reached(parsed):
    sections = [attributes["id"] for attributes in parsed.all("section") if "id" in attributes]
    assert sections == ["measured", "compared", "attacked", "trained", "graphs", "routing", "cost", "made"]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [attributes["href"] for attributes in parsed.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert {f"#{section}" for section in sections} <= set(links)


def test_levels_are_those_of_the_files(parsed, quickstart, trained):
    header, *rows = parsed.tables["Levels"]
    values = {tuple(cell for cell, _ in row[:4]): row[4:] for row in rows}
    assert [cell for cell, _ in header] == ["run", "model", "measure", "on", "value", "low", "high", "measured on"]
    arms = json.loads((quickstart / "report.json").read_text())["arms"]
    for model, arm in arms.items():
        for form in ("clean", "attacked"):
            value, low, high, documents = (value for _, value in values["out", model, "perplexity", form])
            assert value == arm[form]["estimate"]
            assert values["out", model, "perplexity", form][3][0] == f"{documents:.0f} documents"
            assert (low, high, documents) == (arm[form]["low"], arm[form]["high"], arm[form]["num_documents"])
        assert values["out", model, "routing stability", "attacked"][0][0] == f"{arm['routing_kept']:.2%}"
    test = json.loads((trained / "results.json").read_text())["test"]
    assert values["run", "–", "perplexity", "clean"][0][1] == test["clean"]
    assert values["run", "–", "perplexity", "attacked"][0][1] == test["attacked"]


def test_verdicts_are_those_of_the_files(parsed, quickstart, evaluated):
    verdicts = parsed.column("Comparisons", "verdict")
    report = json.loads((quickstart / "report.json").read_text())["comparisons"]
    assert verdicts[:3] == [report[name]["verdict"] for name in ("clean", "attacked", "attacked_to_clean")]
    compared = json.loads((evaluated / "result.json").read_text())["comparisons"]
    own = [compared["clean"]["verdict"]]
    for row in compared["attacks"]:
        own += [row[name]["verdict"] for name in ("perplexity", "ratio", "untouched")]
    assert verdicts[3:] == own
    shown = parsed.column("Comparisons", "p")
    assert [float(value) for value in shown[:3]] == [
        pytest.approx(report[name]["p_value"], rel=1e-3) for name in ("clean", "attacked", "attacked_to_clean")
    ]
    assert "a difference this large occurs in this share of draws" in " ".join(parsed.words.split())
    # Clean, then each attack once, over all its severities.
    assert [attributes.get("class") for attributes in parsed.all("span")].count("what") == 3 + 1 + 2 * 2


def test_attacks_and_losses_are_those_of_the_files(parsed, evaluated, trained):
    models = json.loads((evaluated / "result.json").read_text())["models"]
    rows = [row for role in ("model", "against") for row in models[role]["attacks"]]
    assert parsed.column("Attacks by severity", "severity") == ["1", "3", "all"] * 4
    assert parsed.column("Attacks by severity", "model") == ["symphony"] * 6 + ["plain"] * 6
    header, *shown = parsed.tables["Attacks by severity"]
    place = [cell for cell, _ in header].index("against clean")
    assert [row[place][1] for row in shown] == [row["ratio"]["estimate"] for row in rows]
    results = json.loads((trained / "results.json").read_text())
    (own,) = [row for row in parsed.tables["Losses"] if row[0][0] == "run" and row[1][0] == "–"]
    evaluations = [entry["eval_loss"] for entry in results["validation"]]
    losses = [results["losses"][place]["loss"] for place in (0, -1)]
    assert [value for _, value in own[2:]] == [3, *losses, evaluations[-1], min(evaluations)]


def test_graph_numbers_are_those_of_the_checkpoint(parsed, trained):
    tensors = load_file(trained / "final" / "model.safetensors")
    graphs = {name: graph for name, graph in tensors.items() if name.endswith(".symphony.adjacency")}
    header, *rows = parsed.tables["Graphs by layer"]
    names = [cell for cell, _ in header]
    own = {row[names.index("router")][0]: row for row in rows if row[0][0] == "run"}
    assert {f"{router}.symphony.adjacency" for router in own} == set(graphs)
    for router, row in own.items():
        graph = graphs[f"{router}.symphony.adjacency"].double()
        load = graph.diagonal() / graph.trace()
        entropy = -(load[load > 0] * load[load > 0].log()).sum() / torch.tensor(16.0).log()
        assert row[names.index("load entropy")][1] == pytest.approx(float(entropy))
        assert row[names.index("highest load")][1] == pytest.approx(float(16 * load.max()))
        assert row[names.index("neighbours")][1] == pytest.approx(float(1 - graph.trace() / graph.sum()))


def test_routing_has_one_row_per_layer(parsed, routed):
    header, *rows = parsed.tables["Routing of routed"]
    names = [name for name, _ in header]
    result = json.loads((routed / "result.json").read_text())
    assert [row[0][0] for row in rows] == [f"layer {number}" for number in range(len(result["routers"]))]
    entropy = [result["layers"][router]["load_entropy"] for router in result["routers"]]
    assert [row[names.index("load entropy")][1] for row in rows] == pytest.approx(entropy)
    assert "experts' similarity" not in names  # was not measured
    assert "routed: Experts selected together on this text" in parsed.words
    assert "routed: Where routing changes under attack: aaa" in parsed.words


def test_settings_that_differ_are_shown_and_no_others(trained, tmp_path, quick_pictures):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    results = json.loads((other / "results.json").read_text())
    results["recipe"]["symphony"] |= {"strength": 0.0, "decay": 0.99999}
    results["recipe"]["train"]["seed"] = 7
    results["recipe"]["output"]["directory"] = "elsewhere"
    (other / "results.json").write_text(json.dumps(results))
    parsed = Parsed(write_page(read_runs([trained, other]), tmp_path / "page.html"))
    table = parsed.tables["Settings that differ: training run"]
    assert [[cell for cell, _ in row] for row in table] == [
        ["setting", "run", "other"],
        ["symphony.decay", "0.99", "0.99999"],
        ["symphony.strength", "1.0", "0.0"],
        ["train.seed", "0", "7"],
    ]


def test_nothing_is_fetched(parsed, page):
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "action", "data", "poster", "style"):
                assert name != "style"
                assert value.startswith(("data:", "#")), (tag, name, value[:40])
    source = page.read_text()
    assert "@import" not in source
    assert "url(" not in source
    policy = next(attributes["content"] for attributes in parsed.all("meta") if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert list(page.parent.iterdir()) == [page]


def test_pictures_have_words(parsed):
    pictures = parsed.all("img")
    # Two measures, two attacks, two kinds of loss, two pictures of each graph, and what the diagnostics drew.
    assert len(pictures) == 2 + 2 + 2 + 2 * 2 + 2
    assert all(len(attributes["alt"]) > 15 for attributes in pictures)
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)


def test_what_runs_are_called_is_text_and_never_markup(trained, tmp_path, quick_pictures):
    run = tmp_path / ATTACK
    shutil.copytree(trained, run)
    results = json.loads((run / "results.json").read_text())
    results["command"] = "</code></script><script>alert(1)</script>"
    results["device"] = "\"'><b onmouseover=alert(1)>"
    results["versions"] = {"<i>": "<u>$x^$</u>"}
    (run / "results.json").write_text(json.dumps(results))
    parsed = Parsed(write_page(read_runs([run, trained]), tmp_path / "page.html"))
    assert len(parsed.all("script")) == 1
    assert not {"b", "i", "u"} & {tag for tag, _ in parsed.tags}
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert all(attributes["src"].startswith("data:") for attributes in parsed.all("img"))
    for words in (ATTACK, results["command"], results["device"], "<u>$x^$</u>"):
        assert words in parsed.words


def test_runs_with_the_same_name_get_distinct_names(trained, tmp_path, quick_pictures):
    for folder in ("a", "b"):
        shutil.copytree(trained, tmp_path / folder / "run")
    runs = read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    parsed = Parsed(write_page(runs, tmp_path / "page.html"))
    assert set(parsed.column("Levels", "run")) == {"a/run", "b/run"}
    with pytest.raises(ReportError, match="given twice"):
        write_page([runs[0], runs[0]], tmp_path / "page.html")


def test_the_command_writes_the_page(trained, tmp_path, quick_pictures):
    result = CliRunner().invoke(app, ["report", str(trained), "--output", str(tmp_path / "new" / "one.html")])
    assert result.exit_code == 0, result.output
    assert "1 run, " in result.output
    page = tmp_path / "new" / "one.html"
    assert str(page) in result.output.replace("\n", "")
    parsed = Parsed(page)
    assert "run" not in [cell for cell, _ in parsed.tables["Levels"][0]]  # there is one
    before = page.read_bytes()
    write_page(read_runs([trained]), page)
    assert page.read_bytes() == before  # the same runs, the same page


def test_only_a_page_is_written(trained, tmp_path, quick_pictures):
    results = trained / "results.json"
    with pytest.raises(ReportError, match=r"must end in \.html"):
        write_page(read_runs([trained]), results)
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="could not be written"):
        write_page(read_runs([trained]), tmp_path / "file" / "page.html")


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((57.5314,), "57.53"),
        ((1234.5,), "1,234"),
        ((0.007312, 0.01058), "0.00731"),
        ((0.0,), "0.000"),
        ((3e-6,), "3.000e-06"),
    ],
)
def test_numbers_have_four_digits(values, shown):
    assert format(values[0], four_digits(*values)) == shown


def test_cells_say_what_they_hold():
    assert show_interval(Interval(1.0, 0.9961, 1.0112, 0.95, 12, 0)) == "1.000 [0.996, 1.011]"
    values = (None, True, 12345, 0.99999, 1e-5, [1, 0.25], "a")
    assert [text(value).text for value in values] == ["–", "yes", "12,345", "0.99999", "1e-05", "1, 0.25", "a"]
    assert text(0.99999).value == 0.99999
    assert text(True).value is None


def test_the_page_s_parts_are_installed():
    files = {path.name for path in resources.files(symphony_hf.evaluation.report).iterdir()}
    assert {"page.html", "page.css", "page.js"} <= files
