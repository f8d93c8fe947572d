"""Comparisons of a study's points by seed, and what the study can see: its two positive controls come first."""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from symphony_hf.evaluation.statistics import SeedInterval, interval_text, smallest_difference, t_interval
from symphony_hf.tables import Table

from .point import CONTROLS, Point
from .study import Study

PERPLEXITIES = ("validation", "clean", "attacked", "ratio", "untouched_clean", "untouched_attacked")
"""Measures of text by words that are compared by ratios; the others are compared by differences."""

WORD_MEASURES = (*PERPLEXITIES, "routing_kept", "load_entropy")

NO_VERDICT = "no verdict"
"""Verdict of a study whose controls do not separate."""

DIVERGED = "diverged"
"""Verdict where a run diverged: the seeds that are left would be a choice of the good ones."""

SMALLEST = (
    "Smallest difference: a true difference of this size is found four times out of five by a paired t-test over these "
    "seeds, two-sided at 95%. It is pooled over the forms, each against its own system, so that one form whose seeds "
    "differ widely raises it for all; the interval of a comparison says what that one could tell. A smaller difference "
    "may be there and not be found."
)
WITH_A_VERDICT = "Verdicts are given on measures in which a control differs from SMoE."

Runs = Mapping[int, Mapping[str, Any]]
"""Finished runs of a point, by seed."""


def measures_of(study: Study) -> tuple[str, ...]:
    """Return the names of a study's measures, as a run's result has them."""
    forgotten = [] if study.pretraining is None else ["forgotten_nats"]
    if not study.by_characters:
        return (*WORD_MEASURES, *forgotten)
    names = ["validation_loss", "clean_nats", *forgotten]
    names += [f"{kind}_{rate:g}" for kind in ("damaged_nats", "routing_kept") for rate in study.damage]
    return (*names, "load_entropy")


def title_of(measure: str) -> str:
    """Return the heading of a measure."""
    name, _, rate = measure.rpartition("_")
    titles = {"damaged_nats": "nats, {} damaged", "routing_kept": "choices kept, {} damaged"}
    if name in titles:
        return titles[name].format(f"{100 * float(rate):g}%" if rate[:1].isdigit() else rate)
    own = {
        "clean_nats": "nats, clean",
        "forgotten_nats": "nats, first text",
        "validation_loss": "nats, held-out training text",
        "ratio": "attacked / clean",
        "routing_kept": "routing stability",
    }
    return own.get(measure, measure.replace("_", " "))


def is_share(measure: str) -> bool:
    """Whether a measure is a share of choices, shown in percent."""
    return measure.startswith("routing_kept")


def is_given(measure: str, control: str) -> bool:
    """Whether a control has a measure by its construction, in any study: who chooses all experts keeps all of them."""
    return control == "chosen_experts" and (is_share(measure) or measure == "load_entropy")


def compare(runs: Runs, others: Runs, measures: Sequence[str]) -> dict[str, SeedInterval]:
    """Return each measure's difference, or ratio for perplexities, with its interval, over the seeds that both have."""
    shared = sorted(runs.keys() & others.keys())
    compared = {}
    for measure in measures if shared else ():
        interval = t_interval(_differences(runs, others, measure))
        compared[measure] = interval.exp() if measure in PERPLEXITIES else interval
    return compared


def _differences(runs: Runs, others: Runs, measure: str) -> list[float]:
    """Return the differences of runs by seed; for perplexities, those of their logarithms."""
    shared = sorted(runs.keys() & others.keys())
    pairs = [(runs[seed][measure], others[seed][measure]) for seed in shared]
    if measure in PERPLEXITIES:
        return [math.log(a / b) for a, b in pairs]
    return [a - b for a, b in pairs]


def null_of(measure: str) -> float:
    """Return the value of a comparison that means no difference."""
    return 1.0 if measure in PERPLEXITIES else 0.0


def verdict_of(measure: str, interval: SeedInterval, visible: bool = True) -> str:
    """Return the verdict of one comparison, without a correction for multiple comparisons.

    Args:
        measure: Name of the measure.
        interval: Interval of the comparison.
        visible: Whether the study's controls show that it can see routing by this measure.
    """
    if not visible:
        return NO_VERDICT
    if interval.low is None:
        return "one seed"
    null = null_of(measure)
    if not interval.excludes(null):
        return "not distinguishable"
    is_higher = interval.estimate > null
    if measure == "load_entropy":
        return "higher" if is_higher else "lower"  # neither is better in itself
    return "better" if is_higher == is_share(measure) else "worse"


def find_sight(study: Study, by_point: Mapping[Point, Runs], diverged: Collection[Point] = ()) -> dict[str, Any]:
    """Return what a study can see. Points of which a run diverged show nothing.

    Returns:
        `concludes`: whether learning the routers is worth something on the clean text, with an interval that excludes
        no difference; without it, no verdict is given at all. `measures`: for each measure, the control minus SMoE of
        each control that was run; `smallest`, the smallest difference (or ratio) that as many seeds tell from none, see
        `smallest_difference`; and `visible`, whether a verdict can be given on this measure, which also needs one of
        the two controls to differ in it, and not by its construction.
    """
    plain = Point(graph="identity").canonical()
    controls = {name: dataclasses.replace(plain, control=name) for name in CONTROLS}  # type: ignore[arg-type]
    measures = measures_of(study)
    whole = {point: runs for point, runs in by_point.items() if point not in diverged}
    values = {name: compare(whole.get(point, {}), whole.get(plain, {}), measures) for name, point in controls.items()}
    clean = "clean_nats" if study.by_characters else "clean"
    learned = values["frozen_routers"].get(clean)
    concludes = learned is not None and learned.low is not None and learned.low > null_of(clean)
    found = {}
    for measure in measures:
        differences = {name: compared[measure] for name, compared in values.items() if measure in compared}
        separated = any(
            interval.excludes(null_of(measure)) for name, interval in differences.items() if not is_given(measure, name)
        )
        found[measure] = {
            **{name: dataclasses.asdict(interval) for name, interval in differences.items()},
            "smallest": smallest_told(_pairs(whole, list(controls.values())), measure),
            "visible": concludes and separated,
        }
    return {"concludes": concludes, "clean": clean, "measures": found}


def _pairs(by_point: Mapping[Point, Runs], controls: list[Point]) -> list[tuple[Runs, Runs]]:
    """Return the runs of each form and of its own system as it is; without forms, those of the controls."""
    forms = [point for point in by_point if point not in controls and point != point.plain]
    return [(by_point.get(point, {}), by_point.get(point.plain, {})) for point in forms or controls]


def smallest_told(pairs: Sequence[tuple[Runs, Runs]], measure: str) -> float | None:
    """Return the smallest difference (or ratio) that the seeds tell, from the pooled spread of comparisons by seed."""
    differences = [_differences(runs, others, measure) for runs, others in pairs]
    spreads = [(len(values), statistics.variance(values)) for values in differences if len(values) > 1]
    if not spreads:
        return None
    deviation = math.sqrt(sum(variance for _, variance in spreads) / len(spreads))
    smallest = smallest_difference(deviation, min(count for count, _ in spreads))
    return math.exp(smallest) if smallest is not None and measure in PERPLEXITIES else smallest


def sight_sentence(sight: Mapping[str, Any]) -> str:
    """Return whether anything can be concluded, and from what."""
    learned = sight["measures"][sight["clean"]].get("frozen_routers")
    if learned is None:
        return (
            "**Nothing can be concluded**: the control with frozen routers has no run beside SMoE, or one of them "
            "diverged."
        )
    text = difference_text(learned, sight["clean"])
    if sight["concludes"]:
        nats = f"costs {text.removeprefix('+')} nats per character"
        cost = f"multiplies the perplexity by {text}" if sight["clean"] in PERPLEXITIES else nats
        return (
            f"Freezing the routers at random {cost} on clean text (against SMoE, 95% interval over seeds), so routing "
            "matters here."
        )
    return (
        "**Nothing can be concluded** about routing from this study: on clean text, routers that are frozen at random "
        f"are not significantly worse than trained ones ({text}). No verdict is given."
    )


def sight_table(sight: Mapping[str, Any]) -> Table:
    """Return what the controls are worth, and the smallest difference, by measure."""
    rows = []
    for measure, values in sight["measures"].items():
        controls = [difference_text(values[name], measure) if name in values else "" for name in CONTROLS]
        smallest, visible = _smallest_text(values["smallest"], measure), "yes" if values["visible"] else "no"
        rows.append([title_of(measure), *controls, smallest, visible])
    header = ("measure", *(f"{label}, against SMoE" for label in CONTROLS.values()), "smallest difference", "verdicts")
    return Table("", header, rows)


def sight_page(sight: Mapping[str, Any]) -> list[str]:
    """Return the lines of a report that say what the study can see."""
    return [
        "## What this study can see",
        "",
        sight_sentence(sight),
        "",
        sight_table(sight).to_markdown(),
        "",
        f"{SMALLEST} That is (t at 97.5% + t at 80%) times the standard deviation of the differences by seed, over the "
        f"square root of the number of seeds. {WITH_A_VERDICT}",
    ]


def _smallest_text(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    if is_share(measure):
        return f"{100 * value:.2f} points"
    return f"ratio {value:.4f}" if measure in PERPLEXITIES else f"{value:.4f}"


def difference_text(values: Mapping[str, Any], measure: str) -> str:
    """Format a comparison of a measure: a ratio, a difference, or a difference of shares in points."""
    if is_share(measure):
        return f"{interval_text(values, 2, 100, '+')} points"
    return interval_text(values, 4, sign="" if measure in PERPLEXITIES else "+")
