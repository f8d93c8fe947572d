"""Pictures that are part of the page: nothing is fetched when it opens."""

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
    """A picture with its words.

    Attributes:
        source: The whole of it, as a data URI.
        alt: What it shows, for who cannot see it.
        caption: Below it.
        wide: Whether it has many small parts, so that it must not shrink with the window.
    """

    source: str
    alt: str
    caption: str
    wide: bool = False


def from_svg(content: bytes, alt: str, caption: str) -> Picture:
    """A picture that was drawn for the page."""
    return Picture(_uri("svg+xml", content), alt, caption)


def from_png(path: Path, alt: str, caption: str) -> Picture:
    """A picture that a run drew.

    Raises:
        ReportError: If the file is no PNG.
    """
    content = path.read_bytes()
    if not content.startswith(_PNG):
        raise ReportError(f"report: `{path}` is no PNG: run its command again, or move it away")
    return Picture(_uri("png", content), alt, caption, wide=True)


def of_graphs(
    plot: Callable[[Mapping[str, Tensor], Any], Path], graphs: Mapping[str, Tensor], alt: str, caption: str
) -> Picture:
    """A picture of graphs by one of `diagnostics.plots`, which write files."""
    with tempfile.TemporaryDirectory() as folder:
        return from_png(plot(graphs, Path(folder) / "graphs.png"), alt, caption)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
