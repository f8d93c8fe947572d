"""Terminal tables of routing diagnostics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.text import Text

from symphony_hf.diagnostics.labels import layer_titles, short_names
from symphony_hf.evaluation.statistics import interval_text
from symphony_hf.tables import Table, TableCell


class _Column(NamedTuple):
    """A number of a layer: its names in the report and in the terminal, its format, and how it is read."""

    name: str
    short: str
    form: str
    value: Callable[[Mapping[str, Any]], float | None]


_COLUMNS = (
    _Column("load entropy", "entropy", ".3f", lambda layer: layer["load_entropy"]),
    _Column("busiest / even", "busiest", ".2f", lambda layer: layer["busiest"]),
    _Column("dead experts", "dead", "d", lambda layer: len(layer["dead_experts"])),
    _Column("median margin, nats", "margin", ".3f", lambda layer: layer["margin"].get("p50")),
    _Column("neighbours", "", ".3f", lambda layer: layer["graph"]["neighbours"]),
    _Column("spectral gap", "gap", ".3f", lambda layer: layer["graph"]["spectral_gap"]),
    _Column("modularity", "mod.", ".3f", lambda layer: layer["graph"]["modularity"]),
    _Column("domain information", "dom.", ".3f", lambda layer: layer["domain_information"]),
    _Column("experts' similarity", "CKA", ".3f", lambda layer: (layer["similarity"] or {}).get("mean")),
)

_NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
"""Style with which ten columns fit a terminal of 80 characters."""


def print_observation(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `observe_routing`: by layer, under attack, by checkpoint, and in sentences."""
    console = console or Console()
    documents = result["documents"]
    number, tokens, domains = documents["number"], documents["tokens"], len(result["domains"])
    line = f"{number} documents, {tokens:,} tokens, {domains} domains: {documents['source']}"
    console.print(Text(line), soft_wrap=True)
    _layer_table(result).print(console, **_NARROW)
    if result["corruption"]:
        _corruption_table(result).print(console)
    if result["checkpoints"]:
        _checkpoint_table(result).print(console)
    for sentence in findings(result):
        console.print(Text(f"- {sentence}"), soft_wrap=True)


def findings(result: Mapping[str, Any]) -> list[str]:
    """Return the findings that the tables do not show, one sentence each."""
    sentences = []
    dropped = result["drop_first"]
    if dropped is not None:
        interval = dropped["difference"]
        sentences.append(
            f"Without each token's first expert, with the next in its place: loss {dropped['loss']:.3f} -> "
            f"{dropped['loss_without']:.3f} nats per token ({interval['estimate']:+.3f} [{interval['low']:+.3f}, "
            f"{interval['high']:+.3f}])."
        )
    dead = [f"{name}: {', '.join(map(str, layer['dead_experts']))}" for name, layer in _layers(result)]
    dead = [line for line in dead if not line.endswith(": ")]
    if dead:
        sentences.append(f"Experts with less than a tenth of the even load: {'; '.join(dead)}.")
    by_bias = [layer["margin"]["not_by_logits"] for _, layer in _layers(result) if layer["margin"]]
    if max(by_bias, default=0) > 0:
        share = sum(by_bias) / len(by_bias)
        sentences.append(
            f"{share:.1%} of selections are not the highest logits, because of a bias or of expert groups."
        )
    if result["idle_routers"]:
        sentences.append(f"Routers that do not run on text: {', '.join(result['idle_routers'])}.")
    sentences += [f"Not measured: {name}: {reason}" for name, reason in result["unavailable"].items()]
    return sentences


def layer_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured numbers of each layer by column."""
    rows = []
    for name, layer in _layers(result):
        values = {column.name: column.value(layer) for column in _COLUMNS}
        rows.append({"layer": name, **{column: value for column, value in values.items() if value is not None}})
    return rows


def _layers(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    routers = result["routers"]
    return [(title, result["layers"][name]) for title, name in zip(layer_titles(routers), routers, strict=True)]


def _layer_table(result: Mapping[str, Any]) -> Table:
    caption = (
        "entropy: normalized entropy of the load, 1 for an even load; busiest: highest load over the even load; "
        "margin: median gap behind the last selected expert, in nats; gap: spectral gap, and mod.: modularity, of the "
        "co-selection graph; dom.: information of an expert about the domain, from 0 to 1; CKA: mean similarity of two "
        "experts' outputs"
    )
    columns = [column for column in _COLUMNS if column.short]
    rows = [
        [
            TableCell(name),
            TableCell(f"{layer['top_k']}/{layer['num_experts']}", layer["num_experts"]),
            *(_number(column.value(layer), column.form) for column in columns),
        ]
        for name, layer in _layers(result)
    ]
    header = ["layer", "experts", *(column.short for column in columns)]
    return Table(str(result["settings"]["model"]), header, rows, caption=caption)


def _number(value: float | None, form: str) -> TableCell:
    return TableCell("") if value is None else TableCell(format(value, form), value)


def _corruption_table(result: Mapping[str, Any]) -> Table:
    first, last = result["routers"][0], result["routers"][-1]
    rows = []
    for row in result["corruption"]:
        rate, flips = row["change_rate"], [share for share in row["flips_per_layer"].values() if share is not None]
        rows.append(
            [
                TableCell(row["attack"]),
                _number(row["severity"], "d"),
                TableCell(interval_text(rate, 1, 100, unit="%"), rate["estimate"]) if rate else TableCell(""),
                _number(row["per_layer"][first], ".1%"),
                _number(row["per_layer"][last], ".1%"),
                _number(sum(flips) / len(flips) if flips else None, ".1%"),
            ]
        )
    return Table(
        "under attack, on the tokens that it leaves alone",
        ("attack", "severity", "flip rate", "first", "last", "tokens"),
        rows,
        caption="flip rate: share of selections that change, over all layers, in the first and in the last layer; "
        "tokens: share of tokens with a changed selection",
    )


def _checkpoint_table(result: Mapping[str, Any]) -> Table:
    names = short_names([checkpoint["source"] for checkpoint in result["checkpoints"]])
    rows = []
    for name, checkpoint in zip(names, result["checkpoints"], strict=True):
        saturation, entropy, drift = (
            sum(checkpoint[measure].values()) / len(checkpoint[measure])
            for measure in ("saturation", "load_entropy", "drift")
        )
        values = ((saturation, ".1%"), (1 - saturation, ".1%"), (entropy, ".3f"), (drift, ".3f"))
        rows.append([TableCell(name), *(_number(value, form) for value, form in values)])
    header = ("checkpoint", "saturation", "flip rate", "load entropy", "drift of graph")
    return Table("by checkpoint, against the last", header, rows)
