"""Terminal tables of routing diagnostics."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from symphony_hf.diagnostics.labels import layer_titles, short_names

_LAYER_COLUMNS = ("layer", "experts", "entropy", "busiest", "dead", "margin", "gap", "mod.", "dom.", "CKA")

_NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
"""So that ten columns fit a terminal of 80."""


def print_observation(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what `observe_routing` found: by layer, under attack, by checkpoint, and in sentences."""
    console = console or Console()
    documents = result["documents"]
    console.print(
        f"{documents['number']} documents, {documents['tokens']:,} tokens, {len(result['domains'])} domains: "
        f"{documents['source']}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_layer_table(result))
    if result["corruption"]:
        console.print(_corruption_table(result))
    if result["checkpoints"]:
        console.print(_checkpoint_table(result))
    for sentence in findings(result):
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)


def findings(result: Mapping[str, Any]) -> list[str]:
    """Return the findings that the tables do not show, one sentence each."""
    sentences = []
    dropped = result["drop_first"]
    if dropped is not None:
        interval = dropped["difference"]
        sentences.append(
            f"Without each token's first expert, the next in its place: loss {dropped['loss']:.3f} -> "
            f"{dropped['loss_without']:.3f} nats per token ({interval['estimate']:+.3f} [{interval['low']:+.3f}, "
            f"{interval['high']:+.3f}])."
        )
    dead = [f"{name}: {', '.join(map(str, layer['dead_experts']))}" for name, layer in _layers(result)]
    dead = [told for told in dead if not told.endswith(": ")]
    if dead:
        sentences.append(f"Experts with less than a tenth of the even load: {'; '.join(dead)}.")
    by_bias = [layer["margin"]["not_by_logits"] for _, layer in _layers(result) if layer["margin"]]
    if max(by_bias, default=0) > 0:
        share = sum(by_bias) / len(by_bias)
        sentences.append(f"{share:.1%} of choices are not those of the highest logits: a bias, or groups, chose.")
    if result["idle_routers"]:
        sentences.append(f"Routers that do not run on text: {', '.join(result['idle_routers'])}.")
    sentences += [f"Not measured: {name}: {reason}" for name, reason in result["unavailable"].items()]
    return sentences


def layer_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of each layer by name, those that were measured."""
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
        "entropy of the load, 1 when even; busiest: the highest load over the even one; margin: median gap behind the "
        "last expert chosen, in nats; gap: spectral, and mod.: modularity, of the graph of experts chosen together; "
        "dom.: what an expert tells about the domain, from 0 to 1; CKA: mean similarity of two experts' outputs"
    )
    title = str(result["settings"]["model"])
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", **_NARROW)
    for column in _LAYER_COLUMNS:
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for name, layer in _layers(result):
        graph, similarity = layer["graph"], layer["similarity"]
        table.add_row(
            name,
            f"{layer['top_k']}/{layer['num_experts']}",
            f"{layer['load_entropy']:.3f}",
            f"{layer['busiest']:.2f}",
            str(len(layer["dead_experts"])),
            f"{layer['margin']['p50']:.3f}" if layer["margin"] else "",
            f"{graph['spectral_gap']:.3f}",
            f"{graph['modularity']:.3f}",
            f"{layer['domain_information']:.3f}",
            "" if similarity is None else f"{similarity['mean']:.3f}",
        )
    return table


def _corruption_table(result: Mapping[str, Any]) -> Table:
    caption = "choices that changed, over all layers, in the first and in the last; tokens that changed any"
    title = "under attack, on the tokens that it left alone"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("attack")
    for column in ("severity", "choices changed", "first", "last", "tokens"):
        table.add_column(column, justify="right")
    first, last = result["routers"][0], result["routers"][-1]
    for row in result["corruption"]:
        rate, flips = row["change_rate"], list(row["flips_per_layer"].values())
        table.add_row(
            row["attack"],
            str(row["severity"]),
            f"{rate['estimate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]",
            f"{row['per_layer'][first]:.1%}",
            f"{row['per_layer'][last]:.1%}",
            f"{sum(flips) / len(flips):.1%}",
        )
    return table


def _checkpoint_table(result: Mapping[str, Any]) -> Table:
    table = Table(title="by checkpoint, against the last", title_justify="left")
    table.add_column("checkpoint")
    for column in ("saturation", "changed", "load entropy", "drift of graph"):
        table.add_column(column, justify="right")
    names = short_names([checkpoint["source"] for checkpoint in result["checkpoints"]])
    for name, checkpoint in zip(names, result["checkpoints"], strict=True):
        saturation, entropy, drift = (
            sum(checkpoint[measure].values()) / len(checkpoint[measure])
            for measure in ("saturation", "load_entropy", "drift")
        )
        table.add_row(name, f"{saturation:.1%}", f"{1 - saturation:.1%}", f"{entropy:.3f}", f"{drift:.3f}")
    return table
