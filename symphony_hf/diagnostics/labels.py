"""Short names of layers and models. The file stands alone because pictures and tables share it."""

from collections.abc import Mapping, Sequence
from typing import Any


def layer_titles(names: Sequence[str]) -> list[str]:
    """Shorten module paths to the parts in which they differ: `model.layers.3.mlp.gate` to `layer 3`."""
    columns = list(zip(*(name.split(".") for name in names), strict=False))
    differing = [number for number, column in enumerate(columns) if len(set(column)) > 1]
    titles = [".".join(name.split(".")[number] for number in differing) for name in names]
    if not all(titles) or len(set(titles)) < len(names):
        return list(names)
    return [f"layer {title}" if title.isdigit() else title for title in titles]


def short_names(sources: Sequence[str]) -> list[str]:
    """Shorten folders, or names on the Hub, to their last part; keep them whole if two would be the same."""
    short = [source.replace("\\", "/").rstrip("/").rpartition("/")[2] or source for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def model_names(settings: Mapping[str, Any], roles: Sequence[str]) -> dict[str, str]:
    """Return the short name of each role's model, with the role where two are revisions of one."""
    names = dict(zip(roles, short_names([str(settings[role]) for role in roles]), strict=True))
    if len(set(names.values())) == len(names):
        return names
    return {role: f"{name} ({role})" for role, name in names.items()}
