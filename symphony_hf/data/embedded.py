"""Data that needs no download: source files and docstrings of the running Python's standard library."""

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
"""Folders of tests, which many distributions do not ship; the corpus is the same without them."""

_LEFT_OUT = frozenset((*_TESTS, "site-packages", "dist-packages", "__pycache__", "encodings"))
"""Folders to skip: character tables, and what is not source of the standard library."""

_GENERATED = "_sysconfigdata"
"""Prefix of a file with the build settings of this machine, including paths."""

_SHORTEST = 500
"""Minimum number of characters. Shorter files are stubs or re-exports."""

_LARGEST = 200_000
"""Maximum number of bytes. Larger files are generated tables, or would dominate their split."""

_ENOUGH = 1_000_000
"""Minimum number of characters of the corpus. A complete Python has several times as many."""


def embedded_corpus() -> Corpus:
    """Read the source files of the running Python's standard library, each one document, sorted by path.

    Nothing is downloaded or stored. Files are split by the hash of their path, so a file is in the same split on every
    machine. The text varies slightly between versions of Python; `source` names the version. Of files with equal text,
    the first is kept. A Python without its sources raises DataError.
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
            f"in {root}, found {num_characters:,}; give `data.path` in a recipe, or `--data`: a text file, a "
            "folder, or the name of a data set"
        )
    splits = complete_splits({"train": list(documents.values())}, by_name)
    return build_corpus(splits, source=f"standard library of Python {platform.python_version()}")


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_GENERATED)]
    # is_file: a packaged Python may have broken links.
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
"""Minimum and maximum number of characters of a summary, which is a sentence or two."""

_ENOUGH_SUMMARIES = 300
"""Minimum number of summaries. A Python that keeps its docstrings has several times as many."""


class Described(NamedTuple):
    """Function or class, and the first paragraph of its docstring."""

    name: str
    summary: str


def described_names() -> list[Described]:
    """Collect the public names of well-known modules whose docstring begins with a sentence, with that sentence.

    They are sorted by module and name. Of names with equal summaries, the first is kept, so a summary identifies its
    name. A Python without docstrings raises DataError.
    """
    found: dict[str, Described] = {}  # by summary
    for name, value in _public_objects():
        # `inspect.getdoc` would give a method the docstring of the one that it overrides.
        text = value.__doc__ if isinstance(value.__doc__, str) else ""
        summary = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
        if _SHORTEST_SUMMARY <= len(summary) <= _LONGEST_SUMMARY and summary[0].isupper() and summary.endswith("."):
            found.setdefault(summary, Described(name, summary))
    if len(found) < _ENOUGH_SUMMARIES:
        raise DataError(
            f"the library of this Python describes {len(found)} of its functions, expected over {_ENOUGH_SUMMARIES}: "
            "run without -OO, or give `data.path` in a recipe, or `--data`"
        )
    return list(found.values())


def _public_objects() -> Iterator[tuple[str, object]]:
    for module_name in _MODULES.split():
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            value = getattr(module, name, None)
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            yield f"{module_name}.{name}", value
            members = vars(value) if inspect.isclass(value) else {}
            for member in sorted(members):
                if not member.startswith("_") and inspect.isroutine(members[member]):
                    yield f"{module_name}.{name}.{member}", members[member]
