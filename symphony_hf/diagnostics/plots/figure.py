"""Helpers of all figures: files, shown layers, and colours.

Figures use matplotlib's object API only, so nothing here opens a window, needs a display, or changes a notebook's own
figures.
"""

import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from symphony_hf.diagnostics.labels import layer_titles
from symphony_hf.errors import GraphError
from symphony_hf.files import replacing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

_DPI = 150
_MAX_LAYERS = 16


def save_png(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG atomically."""
    path = Path(path)
    with replacing(path) as written:
        figure.savefig(written, format="png", dpi=_DPI)
    return path


def as_svg(figure: Figure) -> bytes:
    """Return the figure as an SVG for a page: letters as shapes, no background, and deterministic bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "symphony_hf"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def plain_label(text: str, longest: int = 40) -> str:
    """Escape a name so that matplotlib draws it literally: no formulas between dollars, no hidden leading underscore.

    Names that are too long for a legend lose their middle.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"
    text = "".join(letter if letter.isprintable() else " " for letter in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices below `count`, including the first and the last."""
    return [round(position) for position in np.linspace(0, count - 1, min(count, most))]


def shown_names(names: Sequence[str], most: int = _MAX_LAYERS) -> tuple[dict[str, str], str]:
    """Return the names of at most `most` evenly spaced layers by title, and a note on how many are left out."""
    shown = [names[index] for index in evenly_spaced(len(names), most)]
    left_out = "" if len(shown) == len(names) else f" ({len(shown)} of {len(names)} layers)"
    titles = [plain_label(title, len(title)) for title in layer_titles(shown)]  # in full: they tell layers apart
    return dict(zip(titles, shown, strict=True)), left_out


def shown_layers(graphs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the graphs of at most 16 evenly spaced layers by title, and a note on how many are left out."""
    if not graphs:
        raise GraphError("no graphs to plot: the model has no Symphony router")
    titles, left_out = shown_names(list(graphs))
    return {title: graphs[name] for title, name in titles.items()}, left_out


def titled_panels(figure: Figure, rows: int, columns: int, titles: Collection[str]) -> np.ndarray:
    """Add a grid of panels with these titles; those without one are empty. Shape: (rows, columns)."""
    axes = np.array(figure.subplots(rows, columns, squeeze=False))
    for panel, title in zip_longest(axes.flat, titles):
        if title is None:
            panel.set_axis_off()
        else:
            panel.set_title(title, fontsize=9)
    return axes


def grid(num_panels: int) -> tuple[int, int]:
    """Return rows and columns of a grid that is not taller than wide."""
    columns = math.ceil(math.sqrt(num_panels))
    return math.ceil(num_panels / columns), columns
