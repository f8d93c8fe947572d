"""The corpus that is always there: the sources of the Python that runs, code and the prose that explains it."""

import importlib
import inspect
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from symphony_hf.errors import DataError

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


SOURCE = f"docstrings of the standard library of Python {platform.python_version()}"

_MODULES = """
argparse ast base64 bisect calendar collections colorsys configparser contextlib copy csv dataclasses datetime decimal
difflib enum fileinput fnmatch fractions functools gettext glob gzip hashlib heapq hmac html inspect io ipaddress
itertools json keyword linecache locale logging math mimetypes operator os.path pathlib pickle platform pprint queue
random re reprlib secrets selectors shlex shutil statistics string struct subprocess tempfile textwrap threading timeit
tokenize traceback types unicodedata urllib.parse uuid warnings weakref zipfile
"""

_SHORTEST_SUMMARY, _LONGEST_SUMMARY = 20, 400
"""Characters of a first paragraph that is a sentence or two."""

_ENOUGH_SUMMARIES = 300
"""A Python that keeps its docstrings has several times as many."""


class Described(NamedTuple):
    """A function or class, and the first paragraph of its docstring."""

    name: str
    summary: str


def described_names() -> list[Described]:
    """Everything public in some well-known modules whose docstring begins with a sentence.

    Returns:
        Sorted by module and name. Of names with the same summary the first is kept, so that a summary tells its name.

    Raises:
        DataError: If this Python has no docstrings.
    """
    found: dict[str, Described] = {}  # by summary
    for name, thing in _public_things():
        # Its own: `inspect.getdoc` would give a method the docstring of the one that it overrides.
        text = thing.__doc__ if isinstance(thing.__doc__, str) else ""
        summary = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
        if _SHORTEST_SUMMARY <= len(summary) <= _LONGEST_SUMMARY and summary[0].isupper() and summary.endswith("."):
            found.setdefault(summary, Described(name, summary))
    if len(found) < _ENOUGH_SUMMARIES:
        raise DataError(
            f"the library of this Python describes {len(found)} of its functions, expected over {_ENOUGH_SUMMARIES}: "
            "run without -OO, or give data.path"
        )
    return list(found.values())


def _public_things() -> Iterator[tuple[str, object]]:
    for module_name in _MODULES.split():
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name, None)
            if name.startswith("_") or not (inspect.isroutine(thing) or inspect.isclass(thing)):
                continue
            yield f"{module_name}.{name}", thing
            members = vars(thing) if inspect.isclass(thing) else {}
            for member in sorted(members):
                if not member.startswith("_") and inspect.isroutine(members[member]):
                    yield f"{module_name}.{name}.{member}", members[member]
