"""The project's pages, read with a Markdown parser: blocks between comments, code, links and headings.

A block stands between `<!-- name -->` and `<!-- end -->`. A comment right above a code block names it.
"""

import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FOLDERS = ("recipes", "symphony_hf")


def pages_of(root: Path) -> list[Path]:
    """The pages below a root, without the reports and model cards that notebooks write beside themselves."""
    deep = (page for folder in FOLDERS for page in (root / folder).rglob("*.md"))
    return sorted([*root.glob("*.md"), *(root / "notebooks").glob("*.md"), *deep])


PAGES = pages_of(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAMILIES = ROOT / "symphony_hf" / "patching" / "families" / "README.md"

_PARSER = MarkdownIt("commonmark").enable("table")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@functools.cache
def tokens_of(page: Path) -> list[Token]:
    """The tokens of a page, or of a notebook's Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return _PARSER.parse(text)


def inline_of(page: Path) -> list[Token]:
    """Links, images, code spans and text, in their order."""
    return [inner for token in tokens_of(page) for inner in token.children or []]


def links_of(page: Path) -> list[str]:
    """Targets of links and images."""
    return [str(token.attrs[key]) for token in inline_of(page) for key in ("href", "src") if key in token.attrs]


def commands_inline_of(page: Path) -> list[str]:
    """Code spans that begin with `symphony` and a word."""
    return [token.content for token in inline_of(page) if token.type == "code_inline" and "symphony " in token.content]


def headings_of(page: Path) -> list[str]:
    """Headings as the anchors that GitHub makes of them."""
    tokens = tokens_of(page)
    texts = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts]


@dataclass(frozen=True)
class Code:
    """A code block.

    Attributes:
        page: The page it is in.
        line: Number of its first line in the page, from 1.
        language: What follows the fence.
        text: Its text.
        name: The comment right above it, or nothing.
    """

    page: Path
    line: int
    language: str
    text: str
    name: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def code_of(page: Path, language: str | None = None) -> list[Code]:
    """The code blocks of a page, in one language or in any."""
    tokens = tokens_of(page)
    return [
        Code(page, token.map[0] + 1, token.info, token.content, _comment(before))
        for before, token in zip([None, *tokens], tokens, strict=False)
        if token.type == "fence" and language in (None, token.info)
    ]


def named_code(page: Path, name: str) -> str:
    """The text of the one code block with this comment above it."""
    (code,) = (code for code in code_of(page) if code.name == name)
    return code.text


def block(page: Path, name: str) -> str:
    """The Markdown between `<!-- name -->` and `<!-- end -->`."""
    comments = [(_comment(token), token.map) for token in tokens_of(page) if token.type == "html_block"]
    ((_, begin), (end_name, end)) = next(pair for pair in itertools.pairwise(comments) if pair[0][0] == name)
    assert end_name == "end", f"{page}: `{name}` has no end"
    return "".join(page.read_text(encoding="utf-8").splitlines(keepends=True)[begin[1] : end[0]])


def table(page: Path, name: str) -> list[list[str]]:
    """The cells of the table in a block, header first."""
    rows: list[list[str]] = []
    for token in _PARSER.parse(block(page, name)):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:
            rows[-1].append(token.content)
    return rows


def items(page: Path, name: str) -> list[str]:
    """The items of the list in a block, each on one line."""
    tokens = _PARSER.parse(block(page, name))
    return [
        after.content.replace("\n", " ")
        for token, after in zip(tokens, tokens[2:], strict=False)
        if token.type == "list_item_open"
    ]


def _comment(token: Token | None) -> str:
    if token is None or token.type != "html_block":
        return ""
    match = re.fullmatch(r"<!-- (.*?) -->", token.content.strip())
    return match[1] if match else ""
