"""Sections of the page on settings, graphs, routing, cost, versions and commands."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from symphony_hf.diagnostics.graph_metrics import load, load_entropy, off_diagonal_mass, spectral_gap
from symphony_hf.diagnostics.routing_metrics import DEAD
from symphony_hf.tables import Table, TableCell

from .pictures import Picture, from_png, of_graphs
from .sections import Named, Section, label
from .tables import MISSING, make_table, number, text


def differing(runs: Named) -> Section | None:
    """Settings that differ between runs of a kind."""
    notes, tables = [], []
    for kind in dict.fromkeys(run.kind for run in runs.values()):
        own = {name: run.settings for name, run in runs.items() if run.kind == kind}
        if len(own) < 2:
            continue
        names = list(dict.fromkeys(setting for settings in own.values() for setting in settings))
        differ = [name for name in names if len({repr(settings.get(name)) for settings in own.values()}) > 1]
        same = len(names) - len(differ)
        if not differ:
            notes.append(f"All {same} settings of the {len(own)} runs of kind {kind} are the same.")
            continue
        notes.append(f"{len(own)} runs of kind {kind}: {len(differ)} settings differ, {same} are the same.")
        rows = [[text(name, code=True), *(text(settings.get(name)) for settings in own.values())] for name in differ]
        tables.append(Table(f"Settings that differ: {kind}", ("setting", *own), rows))
    return Section("settings", "Settings that differ", notes, tables=tables) if notes else None


def graphs(runs: Named) -> Section | None:
    """Show the co-selection graphs as pictures and numbers."""
    from symphony_hf.diagnostics import plots

    found = [(name, model, own) for name, run in runs.items() for model, own in run.graphs.items()]
    if not found:
        return None
    pictures: list[Picture] = []
    for name, model, own in found:
        whose = label(runs, name, model)
        of = f"{len(own)} layers of {len(next(iter(own.values())))} experts"
        pictures += (
            of_graphs(
                plots.plot_graphs,
                own,
                f"Heat maps of {whose}, {of}: co-selections of each expert, below the experts' loads",
                f"{whose}: experts selected together",
            ),
            of_graphs(
                plots.plot_expert_network,
                own,
                f"Networks of {whose}, {of}: pairs that are selected together more often than their loads explain",
                f"{whose}: pairs beyond what their loads explain",
            ),
        )
    rows = [
        [text(name), text(model), text(router, code=True), *_graph_numbers(graph)]
        for name, model, own in found
        for router, graph in own.items()
    ]
    header = ("run", "model", "router", "experts", "load entropy", "highest load", "dead", "neighbours", "spectral gap")
    note = (
        "Load entropy: 1 for an even load, 0 if one expert takes every token. Highest load: relative to the even load. "
        f"Dead: experts with less than {DEAD:.0%} of the even load. Neighbours: share of the graph between different "
        "experts, which smoothing takes from neighbours. Spectral gap: 0 for a graph of separate groups; the larger it "
        "is, the more smoothing blurs experts into one."
    )
    return Section(
        "graphs", "Co-selection graphs", [note], pictures, [make_table("Graphs by layer", header, rows, len(runs))]
    )


def _graph_numbers(graph: Tensor) -> Iterator[TableCell]:
    load_E = load(graph)
    even = 1 / len(load_E)
    yield number(len(load_E))
    yield number(load_entropy(graph), ".3f")
    yield number(float(load_E.max()) / even, ".2f")
    yield number(int((load_E < DEAD * even).sum()))
    yield number(off_diagonal_mass(graph), ".3f")
    yield number(spectral_gap(graph), ".3f")


def routing(runs: Named) -> Section | None:
    """Show the pictures and tables of routing diagnostics."""
    found = {name: run for name, run in runs.items() if run.pictures or run.metrics}
    if not found:
        return None
    pictures = [
        from_png(path, f"{label(runs, name, '')}: {caption}", f"{label(runs, name, '')}: {caption}")
        for name, run in found.items()
        for caption, path in run.pictures.items()
    ]
    tables = []
    for name, run in found.items():
        header = list(dict.fromkeys(column for row in run.metrics for column in row))
        rows = [[_measured(row.get(column)) for column in header] for row in run.metrics]
        if rows:
            tables.append(Table(f"Routing of {name}", header, rows))
    return Section("routing", "Routing", (), pictures, tables)


def _measured(value: str | float | None) -> TableCell:
    return number(value) if isinstance(value, int | float) else text(value)


def cost(runs: Named) -> Section | None:
    """Show time and memory."""
    memory = list(dict.fromkeys(name for run in runs.values() for part in run.costs for name in part.memory))
    rows: list[list[TableCell]] = []
    for name, run in runs.items():
        for part in run.costs:
            seconds = number(part.seconds_per_step)
            sizes = [part.memory.get(peak) for peak in memory]
            peaks = [number(None if size is None else size / 2**30, ".3f") for size in sizes]
            parameters = number(run.parameters)
            rows.append([text(name), text(part.model), parameters, number(part.steps), seconds, *peaks])
            rows[-1].append(number(run.seconds, ",.0f"))
        if not run.costs and run.seconds is not None:
            none = [text(None)] * (4 + len(memory))
            rows.append([text(name), *none, number(run.seconds, ",.0f")])
    if not rows:
        return None
    header = ("run", "model", "parameters", "steps", "seconds per step", *(f"{peak}, GiB" for peak in memory))
    note = (
        "Seconds per step: for a training run, the training time including evaluations over the number of steps; for a "
        "quickstart, the median step. Seconds in all: the whole command. Compare times only on the same idle machine."
    )
    return Section("cost", "Cost", [note], tables=[make_table("Cost", (*header, "seconds in all"), rows, len(runs))])


def made(runs: Named) -> Section:
    """Show commands and versions."""
    packages = list(dict.fromkeys(package for run in runs.values() for package in run.versions))
    rows = [[text(name, code=True), *_versions(runs, name)] for name in packages]
    tables = [Table("Versions", ("package", *runs), rows)] if rows else []
    commands = {name: run.command for name, run in runs.items() if run.command}
    return Section("made", "How it was made", (), tables=tables, commands=commands)


def _versions(runs: Named, package: str) -> Iterator[TableCell]:
    versions: list[Any] = [run.versions.get(package) for run in runs.values()]
    tone = "differs" if len(set(map(str, versions))) > 1 else ""
    for version in versions:
        yield TableCell(MISSING if version is None else str(version), tone=tone)
