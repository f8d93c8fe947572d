"""The matrix as a table: in the terminal, and on a page, which a test keeps up to date."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from symphony_hf.compat import transformers_version
from symphony_hf.errors import ConfigError
from symphony_hf.files import write_text
from symphony_hf.patching.families.capability import Limited, Unsupported
from symphony_hf.results import check_file_place
from symphony_hf.tables import Table

from .checks import NO_AUX_TERM
from .matrix import Failed, FamilyResult, NotApplicable, run_matrix

HEADER = ["model type", "routers", "logits", "scores", "bias", "gradient", "images", "notes"]
_BLOCK = re.compile(r"(<!-- families table -->\n).*?(<!-- end -->)", re.DOTALL)


def list_families(names: Sequence[str] = (), *, check: bool = False, readme: str | None = None) -> list[FamilyResult]:
    """Inspect or check families, and write their table into a page.

    Args:
        names: Model types; all by default.
        check: Run all checks on each family: about a second per family.
        readme: A page to write the table into, between its marks; with --check and no names.

    Raises:
        ConfigError: If a family is unknown, or `readme` is given without `check` or with names, or has no place for it.
    """
    if readme is not None and (names or not check):
        raise ConfigError("symphony families: --readme needs --check, and all families")
    if readme is not None:
        _read_page(Path(readme))  # before minutes of checks
    rows = run_matrix(names, check)
    if readme is not None:
        write_readme(Path(readme), rows)
    return rows


def table_row(row: FamilyResult) -> list[str]:
    """Return the cells of one family."""
    if row.able is None:
        return [f"`{row.family}`", "", "not built", "", "", "", "", row.not_built or ""]
    able = row.able
    if isinstance(able.logits, Unsupported):
        reason = able.logits.reason.partition(": ")[2] or able.logits.reason
        return [f"`{row.family}`", "", "refused", "", "", "", "", reason.partition(". symphony_hf")[0]]
    images = row.results.get("images")
    able_to = (able.scores, able.bias, able.gradient)
    cells = ["yes", *("no" if isinstance(value, Unsupported) else "yes" for value in able_to), _image_cell(images)]
    return [f"`{row.family}`", ", ".join(f"`{name}`" for name in able.routers), *cells, "; ".join(_notes(row))]


def _image_cell(result: object) -> str:
    if isinstance(result, Failed):
        return "fails"
    return "" if result is None or isinstance(result, NotApplicable) else "yes"


def _notes(row: FamilyResult) -> list[str]:
    assert row.able is not None
    notes = [f"**{name} fails**: {row.results[name]}" for name in row.failures]
    for name, value in (("scores", row.able.scores), ("gradient", row.able.gradient)):
        if isinstance(value, Unsupported):
            notes.append(f"{name}: {value.reason}")
    if isinstance(row.able.learning, Limited):
        notes.append(row.able.learning.note)
    # Shown in columns of their own; the page says which models have no balance over the step.
    silent = ("images", "scores", "router gradient", "bias", "step balance")
    reasons = {name: r.reason for name, r in row.results.items() if isinstance(r, NotApplicable) and name not in silent}
    return notes + [f"{name}: {reason}" for name, reason in reasons.items() if reason != NO_AUX_TERM]


def summary(rows: list[FamilyResult]) -> str:
    """Return a one-sentence summary of the matrix."""
    checked = [row for row in rows if row.results]
    failing = [row.family for row in checked if row.failures]
    refused = sum(row.able is not None and not row.able.routers for row in rows)
    not_built = sum(row.able is None and not row.results for row in rows)
    verdict = f"{len(failing)} of them fail something: {', '.join(failing)}" if failing else "nothing fails"
    return (
        f"transformers {transformers_version()}: {len(rows)} model types with a mixture of experts, {len(checked)} "
        f"checked ({verdict}), {refused} refused, {not_built} not built."
    )


def readme_block(rows: list[FamilyResult]) -> str:
    """Return the block of the page between its marks."""
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, *(table_row(row) for row in rows))]
    return "\n".join([f"{summary(rows)}\n", lines[0], "|" + "---|" * len(HEADER), *lines[1:]]) + "\n"


def write_readme(path: Path, rows: list[FamilyResult]) -> None:
    """Write the table into a page, between `<!-- families table -->` and `<!-- end -->`.

    Raises:
        ConfigError: If the page cannot be read, or has no such marks.
    """
    write_text(path, _BLOCK.sub(lambda marks: marks[1] + readme_block(rows) + marks[2], _read_page(path)))


def _read_page(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"symphony families: --readme: `{path}` is no file: give an existing page")
    check_file_place(path, "symphony families: --readme")
    page = path.read_text(encoding="utf-8")
    if not _BLOCK.search(page):
        raise ConfigError(
            f"symphony families: --readme: `{path}` has no `<!-- families table -->` ... `<!-- end -->` to put the "
            "table between: add these two lines"
        )
    return page


def print_rows(rows: list[FamilyResult], console: Console | None = None) -> None:
    """Print the table, and the summary if checks were run."""
    console = console or Console()
    shown = [column for column, name in enumerate(HEADER) if name != "routers"]  # too wide for most terminals
    cells = [[re.sub("[`*]", "", table_row(row)[column]) for column in shown] for row in rows]
    Table("", [HEADER[column] for column in shown], cells).print(console)
    if any(row.results for row in rows):
        console.print(summary(rows), highlight=False)
