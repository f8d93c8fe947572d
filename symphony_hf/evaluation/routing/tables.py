"""Terminal tables of routing diagnostics."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console

from symphony_hf.diagnostics.labels import layer_titles, short_names
from symphony_hf.tables import Table, TableCell

_LAYER_COLUMNS = ("layer", "experts", "entropy", "busiest", "dead", "margin", "gap", "mod.", "dom.", "CKA")

_NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
"""Style with which ten columns fit a terminal of 80 characters."""


def print_observation(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `observe_routing`: by layer, under attack, by checkpoint, and in sentences."""
    console = console or Console()
    documents = result["documents"]
    console.print(
        f"{documents['number']} documents, {documents['tokens']:,} tokens, {len(result['domains'])} domains: "
        f"{documents['source']}",
        highlight=False,
        soft_wrap=True,
    )
    _layer_table(result).print(console, **_NARROW)
    if result["corruption"]:
        _corruption_table(result).print(console)
    if result["checkpoints"]:
        _checkpoint_table(result).print(console)
    for sentence in findings(result):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)


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
        row = {
            "layer": name,
            "load entropy": layer["load_entropy"],
            "busiest / even": layer["busiest"],
            "dead experts": len(layer["dead_experts"]),
            "median margin, nats": layer["margin"].get("p50"),
            **{name.replace("_", " "): layer["graph"][name] for name in ("neighbours", "spectral_gap", "modularity")},
            "tells the domain": layer["domain_information"],
            "experts' similarity": (layer["similarity"] or {}).get("mean"),
        }
        rows.append({column: value for column, value in row.items() if value is not None})
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
    rows = []
    for name, layer in _layers(result):
        graph, similarity = layer["graph"], layer["similarity"]
        rows.append(
            [
                TableCell(name),
                TableCell(f"{layer['top_k']}/{layer['num_experts']}", layer["num_experts"]),
                _number(layer["load_entropy"], ".3f"),
                _number(layer["busiest"], ".2f"),
                _number(len(layer["dead_experts"]), "d"),
                _number(layer["margin"].get("p50"), ".3f"),
                _number(graph["spectral_gap"], ".3f"),
                _number(graph["modularity"], ".3f"),
                _number(layer["domain_information"], ".3f"),
                _number((similarity or {}).get("mean"), ".3f"),
            ]
        )
    return Table(str(result["settings"]["model"]), _LAYER_COLUMNS, rows, caption=caption)


def _number(value: float | None, form: str) -> TableCell:
    return TableCell("") if value is None else TableCell(format(value, form), value)


def _corruption_table(result: Mapping[str, Any]) -> Table:
    first, last = result["routers"][0], result["routers"][-1]
    rows = []
    for row in result["corruption"]:
        rate, flips = row["change_rate"], list(row["flips_per_layer"].values())
        rows.append(
            [
                TableCell(row["attack"]),
                _number(row["severity"], "d"),
                TableCell(f"{rate['estimate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]", rate["estimate"]),
                _number(row["per_layer"][first], ".1%"),
                _number(row["per_layer"][last], ".1%"),
                _number(sum(flips) / len(flips), ".1%"),
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
