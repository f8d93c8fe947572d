"""What the running Python's library says about itself: real sentences that are on every machine."""

import importlib
import inspect
import platform
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import DataError

SOURCE = f"docstrings of the standard library of Python {platform.python_version()}"

_MODULES = """
argparse ast base64 bisect calendar collections colorsys configparser contextlib copy csv dataclasses datetime decimal
difflib enum fileinput fnmatch fractions functools gettext glob gzip hashlib heapq hmac html inspect io ipaddress
itertools json keyword linecache locale logging math mimetypes operator os.path pathlib pickle platform pprint queue
random re reprlib secrets selectors shlex shutil statistics string struct subprocess tempfile textwrap threading timeit
tokenize traceback types unicodedata urllib.parse uuid warnings weakref zipfile
"""

_SHORTEST, _LONGEST = 20, 400
"""Characters of a first paragraph that is a sentence or two."""

_ENOUGH = 300
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
        if _SHORTEST <= len(summary) <= _LONGEST and summary[0].isupper() and summary.endswith("."):
            found.setdefault(summary, Described(name, summary))
    if len(found) < _ENOUGH:
        raise DataError(
            f"the library of this Python describes {len(found)} of its functions, expected over {_ENOUGH}: run without "
            "-OO, or give data.path"
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
