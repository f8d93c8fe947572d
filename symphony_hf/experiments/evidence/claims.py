"""Claims of the evidence page: what the results confirm of the paper, and what they say about the defaults."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_hf.experiments.ablation.comparison import DIVERGED, NO_VERDICT, difference_text, sight_sentence, title_of
from symphony_hf.experiments.ablation.page import PLAIN_SYSTEM, main_measures, plain_name
from symphony_hf.experiments.ablation.point import Point, point_of
from symphony_hf.experiments.theory.report import theory_findings
from symphony_hf.tables import Table

SYSTEM_NAMES = {"smoe": "SMoE", "xmoe": "XMoE", "glam": "GLaM"}


def summarize(
    paper: Mapping[str, Any],
    pairs: Mapping[str, Any] | None,
    ablation: Mapping[str, Any] | None,
    theory: Mapping[str, Any] | None,
    characters: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """Return the claims confirmed, refuted and not tested. Studies of characters come first: they can see routing."""
    lines = [*_overview(characters), *(line for study in characters for line in _of_characters(study))]
    if pairs is not None:
        for measure, claim in (
            ("clean", "lower clean perplexity"),
            ("attacked", "lower attacked perplexity"),
            ("ratio", "a lower ratio of attacked to clean"),
            ("routing_kept", "higher routing stability under attack"),
        ):
            lines.append(f"- **{claim.capitalize()} with the graph**: {_outcome(pairs, measure)}.")
        lines.append(f"- **The experts' load with the graph**, by its entropy: {_outcome(pairs, 'load_entropy')}.")
    if ablation is not None:
        lines.append(f"- **Other forms of the graph**, against {plain_name(ablation)}: {_variants(ablation)}.")
        lines += _control(ablation)
        lines.append(f"- **Defaults of `SymphonyConfig`**: {_defaults(pairs or ablation, ablation)}.")
    if theory is not None:
        lines += [f"- **Theory**: {sentence}" for sentence in theory_findings(theory)]
    lines.append(f"- **Not run**: {'; '.join(paper['not_run'])}.")
    return lines


_OVERVIEW = {"smoe, graph": "the default graph", "smoe, no graph, damage 0.05": "5% damage in training"}
"""Forms in the first table, by label: the graph, and what one would do instead of it."""


def _overview(studies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of what the main forms do in each study of characters, against the plain system."""
    rows = []
    for study in studies:
        for row in _compared(study):
            if row["label"] in _OVERVIEW:
                found = row["against_plain"]
                cells = [difference_text(found[name], name) if name in found else "" for name in main_measures(study)]
                rows.append([study_title(study), _OVERVIEW[row["label"]], str(len(row["seeds"])), *cells])
    if not rows:
        return []
    titles = ("nats, clean", "nats, first text", "nats, most damaged", "choices kept, most damaged")
    table = Table("", ["study", "with", "seeds", *titles], rows)
    return [
        "The main forms against the plain system, in differences: below 0 is better, for choices kept above 0.",
        "",
        table.to_markdown(),
        "",
        "All forms, study by study:",
        "",
    ]


def _of_characters(study: Mapping[str, Any]) -> list[str]:
    """Return what a study of characters can see, and each of its forms against its own system."""
    lines = [f"- **{study_title(study)}**: {sight_sentence(study['sight'])}"]
    other = PLAIN_SYSTEM if plain_name(study) == PLAIN_SYSTEM else "the same system without a graph"
    measured = study["sight"]["measures"]
    for measure in (*(name for name in main_measures(study) if name in measured), "load_entropy"):
        found = []
        for row in _compared(study):
            values = row["against_plain"][measure]
            verdict = "" if values["verdict"] == NO_VERDICT else f", {values['verdict']}"
            found.append(f"`{row['label']}` {_difference(values, measure)}{verdict}")
        heading = f"**{study_title(study)}, {title_of(measure)}**, against {other}"
        lines.append(f"- {heading}: {'; '.join(found)}.{_frozen(study, measure)}")
    better = _labels_of(_compared(study), "clean_nats", "better")
    if study["settings"]["learning_rates"] and study["sight"]["concludes"]:
        lines.append(f"- **{study_title(study)}, defaults**: {_winners(study)}.")
    elif better and not study["settings"]["learning_rates"]:
        lines.append(
            f"- **{study_title(study)}, defaults**: {better} is a candidate. No default follows from this study, which "
            "did not tune the learning rate of each form."
        )
    return lines


def _frozen(study: Mapping[str, Any], measure: str) -> str:
    """Return the sentence on the control with frozen routers: what differs from no graph may not need a graph."""
    values = study["sight"]["measures"][measure].get("frozen_routers")
    return "" if values is None else f" The control, routers frozen at random: {_difference(values, measure)}."


def _is_better_frozen(study: Mapping[str, Any], measure: str) -> bool:
    """Whether routers that are frozen at random are better than trained ones, so that no form of them wins there."""
    values = study["sight"]["measures"][measure].get("frozen_routers")
    return values is not None and values["high"] is not None and values["high"] < 0


def _winners(study: Mapping[str, Any]) -> str:
    """Return the forms that are better on a text, clean, damaged or the first one, and worse on none.

    Neighbours that are no better than as many experts at random owe nothing to the graph.
    """
    texts = ["clean_nats", *(f"damaged_nats_{rate:g}" for rate in study["settings"]["damage"])]
    texts += ["forgotten_nats"] if study["settings"]["pretraining_steps"] else []
    without = [name for name in texts if _is_better_frozen(study, name)]
    won: list[str] = []
    traded: list[str] = []
    alike: list[str] = []
    for row in _compared(study):
        verdicts = {
            verdict
            for name in texts
            if (verdict := row["against_plain"][name]["verdict"]) != "better" or name not in without
        }
        if "better" in verdicts:
            control = row.get("against_random", {})
            is_alike = bool(control) and "better" not in {control[name]["verdict"] for name in texts}
            (alike if is_alike else traded if "worse" in verdicts else won).append(f"`{row['label']}`")
    found = (
        f"better on one of the texts and worse on none: {', '.join(won)}"
        if won
        else "no form is better on one of the texts and worse on none, so the defaults stay"
    )
    found += f"; better on one and worse on another: {', '.join(traded)}" if traded else ""
    if alike:
        found += f"; not counted: {', '.join(alike)}, no better than with as many experts at random"
    if without:
        found += (
            f"; not counted: better on {' and '.join(title_of(name).removeprefix('nats, ') for name in without)} text, "
            "where routers frozen at random are better than trained ones, so that nothing there speaks for a form of "
            "routing"
        )
    return found


def study_title(study: Mapping[str, Any]) -> str:
    """Return the heading of a study of characters: its title, or its regime and whether learning rates were tuned.

    Reports of earlier versions have no title.
    """
    settings = study["settings"]
    if settings.get("title"):
        return settings["title"]
    regime = "fine-tuning" if settings["pretraining_steps"] else "pre-training"
    if settings["contamination"]:
        regime += " on contaminated text"
    return f"Characters, {regime}" + (", tuned learning rates" if settings["learning_rates"] else "")


def _outcome(ablation: Mapping[str, Any], measure: str) -> str:
    """Return each system's verdict on one claim."""
    words = {"better": "confirmed", "worse": "refuted", "not distinguishable": "not confirmed", "one seed": "open"}
    if measure == "load_entropy":
        words = {"higher": "more even", "lower": "less even", "not distinguishable": "not distinguishable"}
    found = []
    for system, name in SYSTEM_NAMES.items():
        row = find_row(ablation, system, graph=True)
        compared = None if row is None else _without_its_graph(row)
        if compared is None:
            found.append(f"{name} not run")
            continue
        values = compared[measure]
        found.append(f"{name} {words.get(values['verdict'], 'open')} ({_difference(values, measure)})")
    return "; ".join(found)


def _without_its_graph(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the comparisons of a form with itself without a graph, which owe nothing to its other settings."""
    return row.get("against_plain" if point_of(row["point"]).differs_by_graph else "against_no_graph")


def _variants(ablation: Mapping[str, Any]) -> str:
    """Return the number of other graph forms, and those that differ from no graph."""
    at_base = [find_row(ablation, row["point"]["system"], graph=True) for row in ablation["rows"]]
    variants = [row for row in _compared(ablation) if row not in at_base]
    if not variants:
        return "not run"
    found = []
    for name, measure in (("clean", "clean perplexity"), ("routing_kept", "routing stability under attack")):
        if not _has_verdicts(variants, name):
            found.append(f"{measure} no verdict, since the study cannot see it")
            continue
        for verdict in ("better", "worse"):
            found.append(f"{measure} {verdict} with {_labels_of(variants, name, verdict) or 'none'}")
    return f"of {len(variants)}, {'; '.join(found)}"


def _compared(ablation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows of forms that are compared with no graph. Reports of earlier versions have no controls."""
    return [row for row in ablation["rows"] if "against_plain" in row and row["point"].get("control", "none") == "none"]


def _has_verdicts(rows: Sequence[Mapping[str, Any]], measure: str) -> bool:
    return any(row["against_plain"][measure]["verdict"] not in (NO_VERDICT, DIVERGED) for row in rows)


def _labels_of(rows: Sequence[Mapping[str, Any]], measure: str, verdict: str) -> str:
    return ", ".join(f"`{row['label']}`" for row in rows if row["against_plain"][measure]["verdict"] == verdict)


def _control(ablation: Mapping[str, Any]) -> list[str]:
    """Compare the graph with itself under shuffled experts: does it matter which experts it connects?"""
    lines = []
    for row in ablation["rows"]:
        if "against_shuffled" in row:
            found = [
                f"{name} {_difference(row['against_shuffled'][measure], measure)}, "
                f"{row['against_shuffled'][measure]['verdict']}"
                for name, measure in (("clean perplexity", "clean"), ("routing stability under attack", "routing_kept"))
            ]
            lines.append(
                f"- **Control**: `{row['label']}` against itself with its experts shuffled: {'; '.join(found)}."
            )
    return lines


def _defaults(pairs: Mapping[str, Any], ablation: Mapping[str, Any]) -> str:
    """Return what the evidence says about the defaults, their own harm first."""
    compared = _compared(ablation)
    better = _labels_of(compared, "clean", "better")
    if better:
        return f"clean perplexity is better than without a graph with {better}; the defaults should follow"
    kept = "our reading of the paper's form, which is not published in full"
    if not _has_verdicts(compared, "clean"):
        return f"{kept}. The study of other forms cannot see their effect"
    rows = [find_row(pairs, system, graph=True) for system in SYSTEM_NAMES]
    worse = _labels_of([row for row in rows if row is not None and "against_plain" in row], "clean", "worse")
    harm = f", although clean perplexity is worse than without a graph with {worse}" if worse else ""
    return f"{kept}{harm}. None of {len(compared)} forms is better than no graph, so none replaces the defaults"


def find_row(ablation: Mapping[str, Any], system: str, graph: bool) -> Mapping[str, Any] | None:
    """Return a system's row as it is, without a graph, or at the base point."""
    point = ablation["settings"]["base"] if graph else dataclasses.asdict(Point().plain)
    wanted = {**point, "system": system}
    # Points of earlier versions lack the later settings.
    return next((row for row in ablation["rows"] if {**wanted, **row["point"]} == wanted), None)


def _difference(values: Mapping[str, Any], measure: str) -> str:
    return difference_text(values, measure) + (", one seed" if values["low"] is None else "")
