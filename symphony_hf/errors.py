"""Everything that this package raises or warns with.

A message says what was wrong, what was found, where, and what to do. Each kind also derives from the
built-in exception that a caller would expect in its place, so `except ValueError` keeps working.
"""

import difflib
from collections.abc import Iterable


class SymphonyError(Exception):
    """Base of every error that symphony_hf raises on purpose."""


class ConfigError(SymphonyError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnsupportedModelError(SymphonyError, TypeError):
    """The model has no router that symphony_hf can patch, or one that moved since it was last understood."""


class PatchError(SymphonyError, RuntimeError):
    """The model is not in the state that the call needs: already symphonized, not symphonized, wrapped."""


class GraphError(SymphonyError, ValueError):
    """A stored expert graph is missing, misshapen, or not a graph."""


class NoGraphError(GraphError):
    """A checkpoint that can be read has no expert graph, as that of a model without them."""


class FoldError(SymphonyError, ValueError):
    """The graph cannot be folded exactly into a plain router."""


class CheckpointError(SymphonyError, OSError):
    """A checkpoint cannot be written, or is not whole."""


class PushError(SymphonyError, RuntimeError):
    """A folder is not fit for the Hub, or the Hub refuses it, or is not reached."""


class UpcycleError(SymphonyError, ValueError):
    """No MoE family computes what the dense model does, or the two were seen to differ."""


class DataError(SymphonyError, ValueError):
    """A corpus is missing, empty, unreadable, or too short."""


class EvaluationError(SymphonyError, ValueError):
    """An evaluation cannot give the number it was asked for."""


class ReportError(SymphonyError, ValueError):
    """A folder is no run of ours, or one that has not ended, or the page cannot be written."""


class SymphonyWarning(UserWarning):
    """Something that works, but probably not as meant."""


UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError),
)
"""What libraries raise for a config or a file from somebody else that they can make nothing of."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the known name nearest to an unknown one, or the list of all names."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{matches[0]}`?" if matches else f"known names: {', '.join(known)}"
