"""Names of layers and models for pictures and tables."""

from collections.abc import Sequence


def layer_titles(names: Sequence[str]) -> list[str]:
    """Module paths cut to the parts in which they differ: `model.layers.3.mlp.gate` to `layer 3`."""
    columns = list(zip(*(name.split(".") for name in names), strict=False))
    differing = [number for number, column in enumerate(columns) if len(set(column)) > 1]
    titles = [".".join(name.split(".")[number] for number in differing) for name in names]
    if not all(titles) or len(set(titles)) < len(names):
        return list(names)
    return [f"layer {title}" if title.isdigit() else title for title in titles]


def short_names(sources: Sequence[str]) -> list[str]:
    """Folders, or names on the Hub, cut to their last part; whole where that does not tell them apart."""
    short = [source.replace("\\", "/").rstrip("/").rpartition("/")[2] or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)
