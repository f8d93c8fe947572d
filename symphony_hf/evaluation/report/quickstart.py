"""The quickstart's report: Markdown page, pictures, terminal table, and its reader."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.files import write_text
from symphony_hf.tables import Table, TableCell

from .read_training import read_run_graphs
from .runs import Comparison, Cost, Level, Run, as_interval, flat

Curves = dict[str, list[tuple[float, float]]]
_PICTURES = {
    "comparison.png": "Perplexity of both copies, clean and attacked, and their paired ratio",
    "curves.png": "Loss while pre-training and fine-tuning, and the difference of both copies",
    "graphs.png": "The learned co-selection graphs: how often two experts are selected together",
    "network.png": "The same as networks: pairs that are selected together more often than their loads explain",
}


def write_report(
    report: Mapping[str, Any], graphs: Mapping[str, Tensor], curves: Mapping[str, Curves], output: Path
) -> None:
    """Write `report.md` and its pictures into the output folder: graphs by router, and losses by step of each model."""
    from symphony_hf.diagnostics import plots  # matplotlib is slow to import

    perplexities = {
        name: {text: as_interval(arm[text]) for text in ("clean", "attacked")} for name, arm in report["arms"].items()
    }
    ratios = {f"symphony / plain, {text}": as_interval(report["comparisons"][text]) for text in ("clean", "attacked")}
    plots.plot_comparison(perplexities, ratios, output / "comparison.png")
    copies = {name: own for name, own in curves.items() if name in report["arms"]}
    plots.plot_copies(curves["base"], copies, output / "curves.png")
    plots.plot_graphs(graphs, output / "graphs.png")
    plots.plot_expert_network(graphs, output / "network.png")
    write_text(output / "report.md", _page(report))


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, the findings, and the path of the results."""
    console = console or Console()
    result_table(report).print(console)
    for sentence in findings(report):
        console.print(Text(f"- {sentence}"))
    output = Path(report["settings"]["output"]).resolve()
    console.print(Text(f"\nReport, pictures and checkpoints: {output} (start with report.md)"), soft_wrap=True)


def result_table(report: Mapping[str, Any]) -> Table:
    """Return the table of a quickstart's report."""
    arms = report["arms"]
    header = ["", *(f"{name} (strength {strength})" for name, strength in zip(arms, (0, 1), strict=True))]
    rows = []
    for text in ("clean", "attacked"):
        intervals = [arm[text] for arm in arms.values()]
        cells = [TableCell(interval_text(interval, 2), interval["estimate"]) for interval in intervals]
        rows.append([TableCell(f"perplexity, {text} [95%]"), *cells])
    for title, name, form in (
        ("attacked / clean", "ratio", ".4f"),
        ("routing stability", "routing_kept", ".2%"),
        ("seconds per step (median)", "seconds_per_step", ".3f"),
    ):
        rows.append([TableCell(title), *(TableCell(format(arm[name], form), arm[name]) for arm in arms.values())])
    return Table("Fine-tuned on the same batches with the same budget", header, rows)


def findings(report: Mapping[str, Any]) -> list[str]:
    """Return the findings of a quickstart, one sentence each."""
    comparisons, checks = report["comparisons"], report["checks"]
    sentences = []
    for text in ("clean", "attacked"):
        interval = comparisons[text]
        change = f"{interval['estimate'] - 1:+.2%} [{interval['low'] - 1:+.2%}, {interval['high'] - 1:+.2%}]"
        sentences.append(f"Perplexity on {text} text, symphony against plain: {change}: {interval['verdict']}.")
    interval = comparisons["attacked_to_clean"]
    sentences.append(
        f"Attacked / clean, symphony minus plain: {interval['estimate']:+.4f} [{interval['low']:+.4f}, "
        f"{interval['high']:+.4f}]: {interval['verdict']}."
    )
    sentences.append(
        f"Intervals: paired bootstrap over {report['documents']} documents, one training seed. Other seeds may give "
        "other verdicts."
    )
    sentences.append(
        "Both copies count selections and add the router losses, so their steps take the same time up to noise; a "
        f"step of the stock base model took {report['stock_seconds_per_step']:.3f} seconds. The cost is measured by "
        "`symphony bench`."
    )
    sentences.append(
        f"The attack changed {report['words_changed']:.1%} of the words: at least one in every line that has a "
        "word to replace."
    )
    sentences.append(
        f"Reloaded checkpoint: largest logit difference {checks['reload_max_difference']:g}; folded into plain "
        f"routers: {checks['folded_max_difference']:g}, with the same experts for "
        f"{checks['folded_same_choices']:.2%} of tokens."
    )
    return sentences


def _page(report: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    model = ", ".join(f"{name} {value}" for name, value in report["model"].items())
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    lines = [
        "# Symphony quickstart",
        "",
        f"A small OLMoE-shaped model was pre-trained on {report['corpus']['source']}, and two copies of it were "
        "fine-tuned on the same batches with the same budget: `plain` (strength 0: the base model's routing, bit for "
        "bit) and `symphony` (strength 1). Both were evaluated on held-out documents, as they are and with words "
        "replaced by AAA.",
        "",
        result_table(report).to_markdown(),
        "",
        *(f"- {sentence}" for sentence in findings(report)),
        "",
        *(line for name, caption in _PICTURES.items() for line in (f"## {caption}", "", f"![{caption}]({name})", "")),
        "## How it was made",
        "",
        f"- Command: `{report['command']}`, {report['seconds']:.0f} seconds",
        f"- Settings: {settings}",
        f"- Model: {model}",
        f"- Versions: {versions}",
        "- Checkpoints: `base/`, `plain/`, `symphony/` (graph included; loads where symphony_hf is installed) and "
        "`folded/` (plain OLMoE, for any server)",
    ]
    return "\n".join(lines) + "\n"


_COMPARED = {
    "clean": ("clean", "ratio of perplexities per token"),
    "attacked": ("attacked", "ratio of perplexities per token"),
    "attacked_to_clean": ("attacked", "difference of attacked / clean per token"),
}
"""Text and quantity of the report's comparisons."""


def read_quickstart(folder: Path, report: Mapping[str, Any]) -> Run:
    """Read a folder with `report.json`, and the symphonized model in `symphony/`."""
    settings = {name: value for name, value in report["settings"].items() if name != "output"}
    return Run(
        folder=folder,
        kind="quickstart",
        about=f"plain and symphony copies of a small {report['model']['model_type']}, {report['corpus']['source']}",
        findings=findings(report),
        settings=flat({**settings, "model": report["model"], "corpus": report["corpus"]}),
        levels=list(_levels(report)),
        comparisons=list(_comparisons(report)),
        curves={
            model: {name: [(float(x), float(y)) for x, y in points] for name, points in by_name.items()}
            for model, by_name in report.get("curves", {}).items()  # older versions have none
        },
        graphs={"symphony": graphs} if (graphs := read_run_graphs(folder / "symphony")) else {},
        costs=[
            Cost(model, int(report["settings"]["finetune_steps"]), float(arm["seconds_per_step"]))
            for model, arm in report["arms"].items()
        ],
        seconds=float(report["seconds"]),
        versions=report["versions"],
        command=str(report["command"]),
    )


def _levels(report: Mapping[str, Any]) -> Iterator[Level]:
    for model, arm in report["arms"].items():
        for text in ("clean", "attacked"):
            interval = as_interval(arm[text])
            ends = interval.low, interval.high
            yield Level(model, "perplexity", text, interval.estimate, *ends, interval.num_documents)
        yield Level(model, "routing stability", "attacked", float(arm["routing_kept"]))


def _comparisons(report: Mapping[str, Any]) -> Iterator[Comparison]:
    for name, (text, what) in _COMPARED.items():
        values = report["comparisons"][name]
        yield Comparison("symphony", "plain", text, what, as_interval(values), values["verdict"], headline=True)
