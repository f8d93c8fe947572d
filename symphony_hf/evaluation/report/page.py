"""The HTML page: one file with its pictures, style and script inside."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from symphony_hf.compat import __version__
from symphony_hf.errors import ReportError
from symphony_hf.files import write_text

from .background import cost, differing, graphs, made, routing
from .runs import Run, names_of
from .sections import attacked, compared, measured, trained
from .tables import show_interval, verdict

_SECTIONS = (measured, compared, attacked, trained, differing, graphs, routing, cost, made)


def write_page(runs: Sequence[Run], output: Path) -> Path:
    """Write a page that compares one or more runs. An existing file is replaced.

    Contents of runs' files are escaped, and the page forbids the browser to fetch anything or to run any other script.

    Raises:
        ReportError: If the file is not an `.html` file or cannot be written, or a run's picture is invalid.
        GraphError: If a run's graph is invalid.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"report: --output `{output}`: the page is HTML, so its name must end in .html")
    page = _render(dict(zip(names_of(runs), runs, strict=True)))
    try:
        write_text(output, page)
    except OSError as error:
        raise ReportError(f"report: `{output}` could not be written: {error.strerror or error}") from error
    return output


def _render(runs: dict[str, Run]) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html").render(
        title=next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs compared",
        version=__version__,
        runs=runs,
        sections=[section for make in _SECTIONS if (section := make(runs)) is not None],
        show_interval=show_interval,
        tone=lambda word: verdict(word).tone,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(content: str) -> str:
    """Compute the hash by which the content security policy admits the page's style and script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
