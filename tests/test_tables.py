"""One table, three forms: the same cells in the terminal, in Markdown, and for the HTML report."""

import io

from rich.console import Console

from symphony_hf.tables import Table, TableCell, cell_text

TABLE = Table(
    "Loads",
    ("layer", "load"),
    [("first", TableCell("0.5", 0.5)), ("a|b", "–")],
    footer=("sum", "0.5"),
    caption="two layers",
)


def test_the_terminal_has_every_cell_with_numbers_to_the_right():
    console = Console(file=io.StringIO(), width=60)
    TABLE.print(console)
    text = console.file.getvalue()
    for part in ("Loads", "layer", "load", "first", "0.5", "a|b", "–", "sum", "two layers"):
        assert part in text
    assert TABLE.to_rich().columns[1].justify == "right"
    assert TABLE.to_rich().columns[0].justify == "left"


def test_names_are_shown_letter_by_letter():
    """rich would read brackets as markup, and `:key:` as a symbol."""
    console = Console(file=io.StringIO(), width=60)
    names = [f"runs/[lr{n}]/:key:[/x]" for n in range(5)]
    Table(names[0], (names[1],), [(names[2],)], footer=(names[3],), caption=names[4]).print(console)
    assert all(name in console.file.getvalue() for name in names)


def test_markdown_keeps_one_line_a_row_and_escapes_bars():
    assert TABLE.to_markdown().splitlines() == [
        "| layer | load |",
        "| --- | --- |",
        "| first | 0.5 |",
        "| a\\|b | – |",
        "| sum | 0.5 |",
    ]


def test_columns_with_numbers_are_known():
    assert TABLE.numeric == [False, True]
    assert cell_text(TABLE.rows[0][1]) == "0.5"
