"""Pictures embedded in the page."""

import base64
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from symphony_hf.errors import ReportError

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with a description, a caption, and whether its details are too small to shrink."""

    source: str
    alt: str
    caption: str
    wide: bool = False


def from_svg(content: bytes, alt: str, caption: str) -> Picture:
    """Return a picture drawn for the page."""
    return Picture(_uri("svg+xml", content), alt, caption)


def from_png(path: Path, alt: str, caption: str) -> Picture:
    """Return a picture drawn by a run. Raises ReportError if the file is not a PNG."""
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ReportError(f"report: `{path}` is not a PNG: run its command again, or move the file away")
    return Picture(_uri("png", content), alt, caption, wide=True)


def of_graphs(
    plot: Callable[[Mapping[str, Tensor], Any], Path], graphs: Mapping[str, Tensor], alt: str, caption: str
) -> Picture:
    """Draw graphs by a function of `diagnostics.plots` that writes a file."""
    with tempfile.TemporaryDirectory() as folder:
        return from_png(plot(graphs, Path(folder) / "graphs.png"), alt, caption)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
