"""A page as a browser's parser sees it: tags with their attributes, and tables as rows of words."""

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """Attributes: `tags`: (name, attributes) in order. `tables`: by caption, rows of (words, data-value)."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.words = [], {}, ""
        self._caption, self._rows, self._cell = None, None, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, attributes))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ["", attributes.get("data-value")]

    def handle_endtag(self, tag):
        if tag == "caption":
            self._caption = self._cell[0]
        elif tag in ("td", "th"):
            value = self._cell[1]
            self._rows[-1].append((self._cell[0].strip(), None if value is None else float(value)))
        elif tag == "table":
            self.tables[self._caption] = self._rows
        if tag in ("td", "th", "caption"):
            self._cell = None

    def handle_data(self, data):
        self.words += data
        if self._cell is not None:
            self._cell[0] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def column(self, caption, name):
        """The cells of a table's column, as they are shown."""
        header, *rows = self.tables[caption]
        place = [cell for cell, _ in header].index(name)
        return [row[place][0] for row in rows]
