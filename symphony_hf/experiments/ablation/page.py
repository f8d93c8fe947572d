"""The page of a study: what it can see, its table, its comparisons and learning rates; and what a terminal shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.tables import Table

from .comparison import NO_VERDICT, WORD_MEASURES, difference_text, is_share, sight_page, sight_sentence, title_of
from .point import point_of

ROUTING_STABILITY = (
    "Routing stability: the share of their experts that words keep under attack, over words that are not attacked "
    "themselves and have an attacked word before them in their row. Load entropy: the normalized entropy of the "
    "experts' load, 1 for an even load. A router that uses few experts is stable more easily, so read the two "
    "together."
)
"""Explanation of these columns."""

BY_CHANCE = (
    "Verdicts are not corrected for multiple comparisons: of those in which nothing differs, expect one in twenty to "
    "be better or worse by chance."
)

CHOICES_KEPT = ROUTING_STABILITY.replace("Routing stability", "Choices kept").replace("word", "character")


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the table of a study's points."""
    shown, compared = shown_measures(report), compared_measures(report)
    header = ["point", "seeds", *map(title_of, shown), *comparison_titles(report)]
    rows = []
    for row in report["rows"]:
        cells = [row["label"], str(len(row["seeds"]))]
        cells += [_level_text(row[name], name) for name in shown]
        against = row.get("against_plain")
        for name in compared:
            cells.append(_verdict_text(against[name], name) if against else "")
        rows.append(cells)
    return Table("", header, rows)


PLAIN_SYSTEM = "the plain system"
"""Name of what forms are compared with where they differ from it in more than their graph."""

PLAIN_SYSTEM_NOTE = (
    "Forms that differ in more than their graph are compared with the plain system: it has no graph, selects the "
    "top-k, trains its router by the chosen experts alone, and has no damage added to its batches."
)


def plain_name(report: Mapping[str, Any]) -> str:
    """Return the name of what the forms of a report are compared with: `no graph`, or `PLAIN_SYSTEM`."""
    forms = [point for row in report["rows"] if (point := point_of(row["point"])).control == "none"]
    return "no graph" if all(form.differs_by_graph for form in forms) else PLAIN_SYSTEM


def comparison_titles(report: Mapping[str, Any]) -> list[str]:
    """Return the headings of the comparisons in the table of a report."""
    return [f"{title_of(name)} against {plain_name(report)}" for name in compared_measures(report)]


def plain_note(report: Mapping[str, Any]) -> list[str]:
    """Return the sentence on the plain system, if a report's table names it."""
    return [PLAIN_SYSTEM_NOTE] if plain_name(report) == PLAIN_SYSTEM else []


_UNSHOWN = ("validation", "validation_loss", "untouched_clean", "untouched_attacked")
"""Measures that the table leaves out."""


def shown_measures(report: Mapping[str, Any]) -> list[str]:
    """Return the measures in the table of a report. Reports of earlier versions have those of words."""
    measures = report["sight"]["measures"] if "sight" in report else WORD_MEASURES
    return [name for name in measures if name not in _UNSHOWN]


def compared_measures(report: Mapping[str, Any]) -> list[str]:
    """Return the measures whose comparisons are in the table."""
    return [name for name in shown_measures(report) if name != "ratio"]


def main_measures(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the measures of a study of characters that are read first, of the highest damage.

    A study without pre-training lacks the second, `forgotten_nats`.
    """
    rate = f"{max(report['settings']['damage']):g}"
    return "clean_nats", "forgotten_nats", f"damaged_nats_{rate}", f"routing_kept_{rate}"


def _level_text(values: Mapping[str, Any], measure: str) -> str:
    if is_share(measure):
        return interval_text(values, 2, 100, unit="%")
    return interval_text(values, {"clean": 2, "attacked": 2, "load_entropy": 3}.get(measure, 4))


def _brief_table(report: Mapping[str, Any]) -> Table:
    """Return the main comparisons without their intervals, which a terminal has room for."""
    compared = compared_measures(report)
    if report["settings"]["tokenizer"] == "characters":
        compared = [name for name in main_measures(report) if name in compared]
    rows = []
    for row in report["rows"]:
        against = row.get("against_plain")
        cells = [_verdict_text(against[name] | {"low": None}, name) if against else "" for name in compared]
        rows.append([row["label"], str(len(row["seeds"])), *cells])
    return Table(f"Against {plain_name(report)}", ["point", "seeds", *map(title_of, compared)], rows)


def _verdict_text(values: Mapping[str, Any], measure: str) -> str:
    verdict = "" if values["verdict"] == NO_VERDICT else f", {values['verdict']}"
    return difference_text(values, measure) + verdict


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    settings = report["settings"]
    lines = [
        "# Ablation",
        "",
        *sight_page(report["sight"]),
        "",
        "## Points",
        "",
        f"{settings['tokens']:,} tokens per run, seeds {', '.join(map(str, settings['seeds']))}. "
        + " ".join([_UNITS[settings["tokenizer"]], *_forgotten(report), _INTERVALS, *plain_note(report), BY_CHANCE]),
        "",
        ROUTING_STABILITY if settings["tokenizer"] == "words" else CHOICES_KEPT,
        "",
        table_of(report).to_markdown(),
        *own_comparisons(report),
        *tuning_page(report),
    ]
    failed = [f"{cell}: {words}" for cell, words in report["failed"].items()]
    lists = {"Diverged": report["diverged"], "Missing": report["missing"], "Failed": failed}
    for title, problems in (lists | {"Left out": report["left_out"]}).items():
        if problems:
            lines += ["", f"## {title}", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


_UNITS = {
    "words": "Perplexities of the test text; comparisons are ratios, and below 1 is better.",
    "characters": "Nats per character of the test text, on damaged text of the characters left alone; comparisons are "
    "differences, and below 0 is better.",
}


_INTERVALS = "Means with 95% t-intervals over seeds in brackets; comparisons are paired by seed."


def _forgotten(report: Mapping[str, Any]) -> list[str]:
    """Return the unit of what a study of words forgets, since its other measures of text are perplexities."""
    if report["settings"]["tokenizer"] != "words" or "forgotten_nats" not in compared_measures(report):
        return []
    return ["Of the first text, nats per word; comparisons are differences, and below 0 is better."]


def own_comparisons(report: Mapping[str, Any], level: str = "##") -> list[str]:
    """Return the comparisons of forms with themselves without a graph, and with a shuffled one, under a heading."""
    names = {
        "against_no_graph": "without a graph",
        "against_shuffled": "with its experts shuffled",
        "against_random": "with as many experts at random",
    }
    shown = compared_measures(report)
    rows = [
        [f"{row['label']}, against itself {label}", *(_verdict_text(row[key][name], name) for name in shown)]
        for row in report["rows"]
        for key, label in names.items()
        if key in row
    ]
    if not rows:
        return []
    return ["", f"{level} Against themselves", "", Table("", ["point", *map(title_of, shown)], rows).to_markdown()]


def tuning_page(report: Mapping[str, Any], level: str = "##") -> list[str]:
    """Return the table of learning rates and what was chosen, under a heading; nothing for a study of one rate."""
    settings = report["settings"]
    if not report.get("tuning"):  # reports of earlier versions have none
        return []
    rates = [f"{rate:g}" for rate in sorted(settings["learning_rates"])]
    rows = []
    for tuned in report["tuning"]:
        losses = [f"{tuned['losses'][rate]:.4f}" if rate in tuned["losses"] else "" for rate in rates]
        rows.append([tuned["label"], *losses, "" if tuned["chosen"] is None else f"{tuned['chosen']:g}"])
    chosen = {f"{tuned['chosen']:g}" for tuned in report["tuning"] if tuned["chosen"] is not None}
    ends = {"lowest": rates[0], "highest": rates[-1]} if len(rates) > 1 else {}
    beyond = "".join(
        f" {rate} is the {end} rate tried: for the forms that chose it, a {end[:-3]}er one may be better."
        for end, rate in ends.items()
        if rate in chosen
    )
    return [
        "",
        f"{level} Learning rates",
        "",
        f"Mean nats per {settings['tokenizer'].removesuffix('s')} of held-out training text over seeds "
        f"{', '.join(map(str, settings['tuning_seeds']))}, by learning rate. Each point was judged once, on the other "
        f"seeds, at its chosen rate.{beyond}",
        "",
        Table("", ["point", *rates, "chosen"], rows).to_markdown(),
    ]


def print_ablation(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, the failed runs and the path of the report; or the plan of a dry run."""
    console = console or Console()
    if "plan" in report:
        for line in report["plan"]:
            console.print(line, highlight=False)
        return
    console.print(sight_sentence(report["sight"]).replace("**", ""), highlight=False)
    _brief_table(report).print(console)
    for cell in report["diverged"]:
        console.print(f"diverged: {cell}", style="red", highlight=False, soft_wrap=True)
    for cell, words in report["failed"].items():
        console.print(f"failed: {cell}: {words}", style="red", highlight=False, soft_wrap=True)
    console.print(_missing_sentence(report), highlight=False, soft_wrap=True)
    console.print(f"Written to {(Path(report['output']) / 'report.md').resolve()}", highlight=False, soft_wrap=True)


def _missing_sentence(report: Mapping[str, Any]) -> str:
    """Return the number of runs that are missing, with those at learning rates that are not chosen yet."""
    settings, missing = report["settings"], len(report["missing"])
    untuned = [point for point in report["tuning"] if len(point["losses"]) < len(settings["learning_rates"])]
    coming = len(untuned) * len(settings["seeds"])
    after = f", and {coming} at learning rates that are not chosen yet" if coming else ""
    return f"Missing runs: {missing} of {missing + len(report['cells'])}{after}"
