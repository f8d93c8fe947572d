"""The page itself: sections of tables and sentences, every number of them from a result file."""

from collections.abc import Mapping, Sequence
from typing import Any

from symphony_hf.experiments.ablation.report import ROUTING_KEPT, as_markdown, table_of
from symphony_hf.experiments.theory.report import convergence_table, share_table, theory_findings

_NAMES = {"smoe": "SMoE", "xmoe": "XMoE", "glam": "GLaM"}
_ABSENT = "not known"


def evidence_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the page.

    Args:
        results: `paper`, and `ablation`, `pairs` and `theory` where they were run; see `read_results`.
    """
    paper, theory = results["paper"], results.get("theory")
    # A study of which nothing was run says nothing.
    ablation, pairs = (study if study and study["rows"] else None for study in map(results.get, ("ablation", "pairs")))
    pairs = pairs or ablation
    lines = [
        "# Evidence",
        "",
        "Written by `symphony evidence` from the files in `evidence/`; change those, not this page. Brackets are 95% "
        "t-intervals over seeds. A ratio below 1 says that the graph's perplexity is the lower one; it is paired by "
        "seed with the same system without a graph, which has the same weights at the start, batches and budget. Each "
        "verdict is of its interval alone: of twenty, one is expected to be chance.",
        "",
        *_section("In short, at these sizes", _summary(paper, pairs, ablation, theory)),
    ]
    if pairs is not None:
        missing = _missing(pairs) if pairs is not ablation else []
        lines += _section("The three pairs", [*_how(pairs), "", *as_markdown(_pairs(paper, pairs)), *missing])
    if ablation is not None:
        how = [*_how(ablation), ""] if ablation is not pairs else []
        table = [*as_markdown(_axes(ablation)), *_starts_left(ablation), *_missing(ablation)]
        lines += _section("The axes, one change at a time", [*how, *table])
    if theory is not None:
        lines += _section("The theory, on planted communities", _theory(theory))
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _summary(
    paper: Mapping[str, Any],
    pairs: Mapping[str, Any] | None,
    ablation: Mapping[str, Any] | None,
    theory: Mapping[str, Any] | None,
) -> list[str]:
    """What was confirmed, what was not, and what could not be run."""
    lines = []
    if pairs is not None:
        for measure, claim in (
            ("clean", "lower clean perplexity"),
            ("attacked", "lower attacked perplexity"),
            ("ratio", "a lower ratio of attacked to clean"),
            ("routing_kept", "more of the routing kept under attack"),
        ):
            lines.append(f"- **{claim.capitalize()} with the graph**: {_outcome(pairs, measure)}.")
        lines.append(f"- **The experts' load with the graph**, by its entropy: {_outcome(pairs, 'load_entropy')}.")
    if ablation is not None:
        lines.append(f"- **Other forms of the graph**, against no graph: {_variants(ablation)}.")
        lines += _control(ablation)
        lines.append(f"- **Defaults of `SymphonyConfig`**: {_defaults(pairs or ablation, ablation)}.")
    if theory is not None:
        lines += [f"- **Theory**: {sentence}" for sentence in theory_findings(theory)]
    lines.append(f"- **Not run**: {'; '.join(paper['not_run'])}.")
    return lines


def _outcome(ablation: Mapping[str, Any], measure: str) -> str:
    """Each system's verdict on one claim."""
    words = {"better": "confirmed", "worse": "refuted", "not distinguishable": "not confirmed", "one seed": "open"}
    if measure == "load_entropy":
        words = {"higher": "more even", "lower": "less even", "not distinguishable": "not distinguishable"}
    found = []
    for system, name in _NAMES.items():
        row = _row(ablation, system, graph=True)
        if row is None or "against_plain" not in row:
            found.append(f"{name} not run")
            continue
        values = row["against_plain"][measure]
        found.append(f"{name} {words.get(values['verdict'], 'open')} ({_difference(values, measure)})")
    return "; ".join(found)


def _variants(ablation: Mapping[str, Any]) -> str:
    """Which forms other than the base's are told from no graph, and how many there are."""
    at_base = [_row(ablation, row["point"]["system"], graph=True) for row in ablation["rows"]]
    variants = [row for row in ablation["rows"] if "against_plain" in row and row not in at_base]
    if not variants:
        return "not run"
    found = []
    for name, measure in (("clean", "clean perplexity"), ("routing_kept", "routing kept under attack")):
        for verdict in ("better", "worse"):
            found.append(f"{measure} {verdict} with {_told_apart(variants, name, verdict) or 'none'}")
    return f"of {len(variants)}, {'; '.join(found)}"


def _told_apart(rows: Sequence[Mapping[str, Any]], measure: str, verdict: str) -> str:
    return ", ".join(f"`{row['label']}`" for row in rows if row["against_plain"][measure]["verdict"] == verdict)


def _control(ablation: Mapping[str, Any]) -> list[str]:
    """Whether it matters which experts the graph connects: the graph against itself with its experts shuffled."""
    lines = []
    for row in ablation["rows"]:
        if "against_shuffled" in row:
            found = [
                f"{name} {_difference(row['against_shuffled'][measure], measure)}, "
                f"{row['against_shuffled'][measure]['verdict']}"
                for name, measure in (("clean perplexity", "clean"), ("routing kept under attack", "routing_kept"))
            ]
            lines.append(
                f"- **Control**: `{row['label']}` against itself with its experts shuffled: {'; '.join(found)}."
            )
    return lines


def _defaults(pairs: Mapping[str, Any], ablation: Mapping[str, Any]) -> str:
    """What the evidence says of them, the default form's own harm first."""
    compared = [row for row in ablation["rows"] if "against_plain" in row]
    better = _told_apart(compared, "clean", "better")
    if better:
        return f"a better clean perplexity than without a graph has {better}, and they should follow"
    kept = "our reading of the paper's form, which it does not publish in full"
    rows = [_row(pairs, system, graph=True) for system in _NAMES]
    worse = _told_apart([row for row in rows if row is not None and "against_plain" in row], "clean", "worse")
    harm = f", though clean perplexity is worse than without a graph with {worse}" if worse else ""
    return f"{kept}{harm}: of {len(compared)} forms, none has a better one than no graph, and so none to take instead"


def _row(ablation: Mapping[str, Any], system: str, graph: bool) -> Mapping[str, Any] | None:
    """A system's row without a graph, or at the base point."""
    base = ablation["settings"]["base"]
    for row in ablation["rows"]:
        point = row["point"]
        is_plain = point["graph"] == "identity"
        at_base = all(point[name] == value for name, value in base.items() if name != "system")
        if point["system"] == system and (at_base if graph else is_plain):
            return row
    return None


def _how(ablation: Mapping[str, Any]) -> list[str]:
    settings, seeds = ablation["settings"], ", ".join(map(str, ablation["settings"]["seeds"]))
    machines = sorted({_machine(machine) for machine in ablation["machines"]})
    parameters = [cell["parameters"] for cell in ablation["cells"]]
    sizes = " to ".join(f"{size:,}" for size in sorted({min(parameters), max(parameters)}))
    speeds = sorted(cell["tokens_per_cpu_second"] for cell in ablation["cells"])
    return [
        f"`{ablation['command']}`",
        "",
        f"{ablation['about']} Tested on {settings['test_tokens']:,} words, of which the attack replaces "
        f"{settings['attacked_tokens']:,}. Each cell: "
        f"{settings['tokens']:,} words ({settings['steps']:,} steps of {settings['rows']} rows of "
        f"{settings['block_size']}), {sizes} parameters, "
        f"{settings['hidden_size']} wide, "
        f"a vocabulary of {settings['vocab_size']:,} words, Adam at {settings['learning_rate']}; seeds "
        f"{seeds}. {speeds[0]:,.0f} to {speeds[-1]:,.0f} tokens a second of one "
        f"core's time, on a CPU ({'; '.join(machines)}). Perplexities of the paper's size, text and "
        "vocabulary are not to be compared with these; ratios are.",
        "",
        f"{ROUTING_KEPT} Here these are {settings['reached_tokens']:,} words.",
    ]


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("symphony_hf", "torch", "transformers"))
    return f"{machine['machine']}, {versions}"


def _pairs(paper: Mapping[str, Any], ablation: Mapping[str, Any]) -> list[list[str]]:
    by_label = dict(zip((row["label"] for row in ablation["rows"]), table_of(ablation)[1:], strict=True))
    header = table_of(ablation)[0]
    table = [["system", "paper: clean, attacked, ratio", "paper: graph over none, clean, attacked", *header[1:]]]
    others = {row["point"]["system"]: None for row in ablation["rows"]}.keys() - _NAMES.keys()
    unknown = {"clean": None, "attacked": None, "ratio": None}
    rows = paper["rows"] + [
        {"system": system, "graph": graph, "name": f"{system}, {'graph' if graph else 'no graph'}", **unknown}
        for system in sorted(others)
        for graph in (False, True)
    ]
    for known in rows:
        row = _row(ablation, known["system"], known["graph"])
        ratios = paper["graph_over_plain"].get(known["system"], unknown) if known["graph"] else {}
        levels = ", ".join(_known(known[name], 3 if name == "ratio" else 2) for name in ("clean", "attacked", "ratio"))
        over = ", ".join(_known(ratios[name], 4) for name in ("clean", "attacked")) if ratios else ""
        cells = by_label[row["label"]][1:] if row is not None else ["not run", *[""] * (len(header) - 2)]
        table.append([known["name"], levels, over, *cells])
    return table


def _known(value: float | None, digits: int) -> str:
    return _ABSENT if value is None else f"{value:.{digits}f}"


def _axes(ablation: Mapping[str, Any]) -> list[list[str]]:
    """All rows but the other systems' at the base point and without a graph, which the pairs have."""
    header, *rows = table_of(ablation)
    system = ablation["settings"]["base"]["system"]
    of_pairs = [_row(ablation, row["point"]["system"], graph) for row in ablation["rows"] for graph in (False, True)]
    return [
        header,
        *(
            cells
            for cells, row in zip(rows, ablation["rows"], strict=True)
            if row["point"]["system"] == system or row not in of_pairs
        ),
    ]


def _starts_left(ablation: Mapping[str, Any]) -> list[str]:
    """A short run with a slow average routes mostly by the identity, which a reader must know."""
    left = [f"`{row['label']}` {row['start_left']:.1%}" for row in ablation["rows"] if row["start_left"] is not None]
    return ["", f"Of the identity that it starts from, the graph has at the end: {', '.join(left)}."] if left else []


def _missing(ablation: Mapping[str, Any]) -> list[str]:
    """A line for each point that has not all its seeds, and for each cell that failed."""
    by_point: dict[str, list[str]] = {}
    for cell in ablation["missing"]:
        if cell not in ablation["failed"]:
            point, _, seed = cell.rpartition(", seed ")
            by_point.setdefault(point, []).append(seed)
    lines = [f"- not run: {point}, seeds {', '.join(seeds)}" for point, seeds in by_point.items()]
    lines += [f"- failed: {cell}, {words}" for cell, words in ablation["failed"].items()]
    return ["", *lines] if lines else []


def _theory(theory: Mapping[str, Any]) -> list[str]:
    settings = theory["settings"]
    return [
        f"`{theory['command']}`",
        "",
        f"{settings['num_experts']} experts in {settings['num_communities']} communities; a token's two right experts "
        f"are of one community with a chance of {settings['within']:g}, stand out by 1, and all logits have noise. "
        f"{len(settings['seeds'])} seeds, {theory['seconds']:.0f} s.",
        "",
        "Distance of the learned graph to the planted co-selection probabilities, over their norm:",
        "",
        *as_markdown(convergence_table(theory)),
        "",
        "Share of the right experts that are chosen, and the distance of the graph that Symphony has learned by then:",
        "",
        *as_markdown(share_table(theory)),
    ]


def _difference(values: Mapping[str, Any], measure: str) -> str:
    is_share = measure == "routing_kept"
    scale, digits, unit = (100, 2, " points") if is_share else (1, 4, "")
    sign = "+" if is_share or measure == "load_entropy" else ""
    text = f"{scale * values['estimate']:{sign}.{digits}f}"
    if values["low"] is None:
        return f"{text}{unit}, one seed"
    return f"{text} [{scale * values['low']:.{digits}f}, {scale * values['high']:.{digits}f}]{unit}"
