"""One table type, for the terminal, for Markdown and for the HTML report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when a table is printed: the GPU benchmark runs without rich
    from rich.console import Console
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Attributes:
        text: The text as shown.
        value: The number to sort by, if the cell has one.
        tone: `better`, `worse` or `level`, for verdicts.
        code: Whether the text is a name in a program.
    """

    text: str
    value: float | None = None
    tone: str = ""
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under headers. The first column names the rows.

    Attributes:
        title: The table's title.
        header: Column names.
        rows: One sequence of cells per row, as long as the header. A plain string is a cell without a value.
        footer: A last row of totals, as long as the header.
        caption: Notes below the table.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[TableCell | str]]
    footer: Sequence[str] | None = None
    caption: str | None = None

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [
            any(isinstance(row[column], TableCell) and row[column].value is not None for row in self.rows)  # type: ignore[union-attr]
            for column in range(len(self.header))
        ]

    def to_rich(self, **style: Any) -> "RichTable":
        """The table for the terminal. All text is shown as it is: names may have brackets, which are markup to rich.

        Args:
            **style: Settings of `rich.table.Table`, such as `box`.
        """
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, "table.title") if self.title else None,
            title_justify="left",
            caption=Text(self.caption, "table.caption") if self.caption else None,
            caption_justify="left",
            show_footer=self.footer is not None,
            **style,
        )
        for column, name in enumerate(self.header):
            table.add_column(
                Text(name),
                footer=Text(self.footer[column]) if self.footer is not None else "",
                justify="right" if self.numeric[column] else "left",
            )
        for row in self.rows:
            table.add_row(*(Text(cell_text(cell)) for cell in row))
        return table

    def print(self, console: "Console | None" = None, **style: Any) -> None:
        """Print the table to the terminal."""
        from rich.console import Console

        (console or Console()).print(self.to_rich(**style))

    def to_markdown(self) -> str:
        """The table as GitHub-flavoured Markdown, without the title."""
        lines = [list(self.header), ["---"] * len(self.header)]
        lines += [[_escape(cell_text(cell)) for cell in row] for row in self.rows]
        lines += [[_escape(cell) for cell in self.footer]] if self.footer is not None else []
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_text(cell: TableCell | str) -> str:
    """The text of a cell."""
    return cell if isinstance(cell, str) else cell.text


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
