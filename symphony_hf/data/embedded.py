"""The corpus that is always there: the sources of the Python that runs, code and the prose that explains it."""

import os
import platform
import sysconfig
import tokenize
from pathlib import Path

from ..errors import DataError
from .documents import Corpus, Document, build_corpus, by_name, complete_splits

_TESTS = ("test", "tests", "idle_test")
"""Many distributions do not ship them, and the corpus should be the same with and without."""

_LEFT_OUT = frozenset((*_TESTS, "site-packages", "dist-packages", "__pycache__", "encodings"))
"""Folders. The encodings are character tables; the others are not the standard library, or not sources."""

_GENERATED = "_sysconfigdata"
"""Prefix of a table of this machine's build settings, paths included."""

_SHORTEST = 500
"""Characters. Less is a stub or a re-export."""

_LARGEST = 200_000
"""Bytes. More is a generated table, or one file that would dominate its split."""

_ENOUGH = 1_000_000
"""Characters. A complete Python has several times as many."""


def embedded_corpus() -> Corpus:
    """Read the running Python's standard library, each source file one document.

    Nothing is downloaded and nothing is stored. Files are split by the hash of their path, so a file is in the same
    split on every machine; the text varies a little between Python versions, which `source` names.

    Returns:
        Documents sorted by path. Of files with the same text, the first is kept.

    Raises:
        DataError: If this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, Document] = {}  # by text
    for path in _source_files(root):
        # tokenize.open: Python sources declare their own encoding.
        with tokenize.open(path) as file:
            text = file.read()
        if len(text) >= _SHORTEST:
            documents.setdefault(text, Document(path.relative_to(root).as_posix(), text))
    num_characters = sum(map(len, documents))
    if num_characters < _ENOUGH:
        raise DataError(
            f"no embedded corpus: expected the sources of Python's standard library (over {_ENOUGH:,} characters) "
            f"in {root}, found {num_characters:,}; give data.path: a text file, a folder, or the name of a data set"
        )
    splits = complete_splits({"train": list(documents.values())}, by_name)
    return build_corpus(splits, source=f"standard library of Python {platform.python_version()}")


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_GENERATED)]
    # is_file: a packaged Python may hold links that lead nowhere.
    small = [path for path in found if path.is_file() and path.stat().st_size <= _LARGEST]
    return sorted(small, key=lambda path: path.relative_to(root).as_posix())
