"""Exceptions and warnings of this package.

A message says what is wrong, what was found, where, and what to do. Each class also derives from the built-in
exception that fits, so `except ValueError` works.
"""

import difflib
from collections.abc import Iterable


class SymphonyError(Exception):
    """Base class of the errors that symphony_hf raises."""


def one_line(error: SymphonyError) -> str:
    """Return the message of an error in one line, since that of another library, which it may quote, has several."""
    return " ".join(filter(None, map(str.strip, str(error).splitlines())))


class ConfigError(SymphonyError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnsupportedModelError(SymphonyError, TypeError):
    """The model has no router that symphony_hf can patch, or its code differs from what symphony_hf supports."""


class PatchError(SymphonyError, RuntimeError):
    """The model is not in the state that a call needs: already symphonized, not symphonized, or wrapped."""


class GraphError(SymphonyError, ValueError):
    """A stored expert graph is missing, misshapen, or not a graph."""


class NoGraphError(GraphError):
    """A readable checkpoint has no expert graph."""


class FoldError(SymphonyError, ValueError):
    """The graph cannot be folded exactly into a plain router."""


class CheckpointError(SymphonyError, OSError):
    """A checkpoint cannot be written, or is incomplete."""


class PushError(SymphonyError, RuntimeError):
    """A folder cannot be pushed to the Hub, the Hub refuses it, or the Hub is unreachable."""


class UpcycleError(SymphonyError, ValueError):
    """No MoE family computes what the dense model does, or their outputs differ."""


class DataError(SymphonyError, ValueError):
    """A corpus is missing, empty, unreadable, or too short."""


class EvaluationError(SymphonyError, ValueError):
    """An evaluation cannot be computed as requested."""


class ReportError(SymphonyError, ValueError):
    """A folder has no finished run, or the report cannot be written."""


class SymphonyWarning(UserWarning):
    """Something works, but probably not as intended."""


UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
"""Exceptions that libraries raise for an invalid config or file from another source."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the most similar known name, or the list of all names."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{matches[0]}`?" if matches else f"known names: {', '.join(known)}"
