"""The matrix as a table: in the terminal, and in the README, where a test holds it."""

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from symphony_hf.compat import transformers_version
from symphony_hf.errors import ConfigError
from symphony_hf.files import write_text
from symphony_hf.patching.families.capability import Limited, Unsupported

from .matrix import NotApplicable, Row

HEADER = ["model type", "routers", "logits", "scores", "images", "notes"]
_BLOCK = re.compile(r"(<!-- families table -->\n).*?(<!-- end -->)", re.DOTALL)


def table_row(row: Row) -> list[str]:
    """One family in the words of the table."""
    if row.able is None:
        return [f"`{row.family}`", "", "not built", "", "", row.not_built or ""]
    able = row.able
    if isinstance(able.logits, Unsupported):
        reason = able.logits.reason.partition(": ")[2] or able.logits.reason
        return [f"`{row.family}`", "", "refused", "", "", reason.partition(". symphony_hf")[0]]
    images = row.results.get("images")
    cells = ["yes", "no" if isinstance(able.scores, Unsupported) else "yes", _image_cell(images)]
    return [f"`{row.family}`", ", ".join(f"`{name}`" for name in able.routers), *cells, "; ".join(_notes(row))]


def _image_cell(result: object) -> str:
    return "" if result is None or isinstance(result, NotApplicable) else "yes"


def _notes(row: Row) -> list[str]:
    assert row.able is not None
    notes = [f"**{name} fails**: {row.results[name]}" for name in row.failures]
    if isinstance(row.able.scores, Unsupported):
        notes.append(f"scores: {row.able.scores.reason}")
    if isinstance(row.able.learning, Limited):
        notes.append(row.able.learning.note)
    silent = ("images", "scores")  # a column of their own
    reasons = {name: r.reason for name, r in row.results.items() if isinstance(r, NotApplicable) and name not in silent}
    return notes + [f"{name}: {reason}" for name, reason in reasons.items()]


def summary(rows: list[Row]) -> str:
    """One sentence on what the matrix found."""
    checked = [row for row in rows if row.results]
    failing = [row.family for row in checked if row.failures]
    refused = sum(row.able is not None and not row.able.routers for row in rows)
    not_built = sum(row.able is None for row in rows)
    verdict = f"{len(failing)} of them fail something: {', '.join(failing)}" if failing else "nothing fails"
    return (
        f"transformers {transformers_version()}: {len(rows)} model types with a mixture of experts, {len(checked)} "
        f"checked ({verdict}), {refused} refused, {not_built} not built."
    )


def readme_block(rows: list[Row]) -> str:
    """What the README has between its marks."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, *(table_row(row) for row in rows))]
    return "\n".join([f"{summary(rows)}\n", lines[0], "|" + "---|" * len(HEADER), *lines[1:]]) + "\n"


def write_readme(path: Path, rows: list[Row]) -> None:
    """Put the table into a page, between `<!-- families table -->` and `<!-- end -->`.

    Raises:
        ConfigError: If the page has no such marks.
    """
    page = path.read_text(encoding="utf-8")
    if not _BLOCK.search(page):
        raise ConfigError(f"{path}: no `<!-- families table -->` ... `<!-- end -->` to put the table between")
    write_text(path, _BLOCK.sub(lambda marks: marks[1] + readme_block(rows) + marks[2], page))


def print_rows(rows: list[Row], console: Console | None = None) -> None:
    """The table in the terminal, with the sentence below it where checks were run."""
    console = console or Console()
    table = Table()
    shown = [place for place, name in enumerate(HEADER) if name != "routers"]  # too wide for most terminals
    for place in shown:
        table.add_column(HEADER[place], overflow="fold", no_wrap=place == 0)
    for row in rows:
        cells = table_row(row)
        table.add_row(*[re.sub("[`*]", "", cells[place]) for place in shown])
    console.print(table)
    if any(row.results for row in rows):
        console.print(summary(rows), highlight=False)
