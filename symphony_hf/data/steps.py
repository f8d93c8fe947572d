"""What is done to every row, in a form that the cache of `datasets` knows again, and only then."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._version import __version__


@dataclass(frozen=True)
class Step:
    """A function of a row with its settings, for `Dataset.map`.

    `datasets` finds results of the same step in its cache. It knows a function by its name alone, so this package's
    version is in the step: another one may do something else under the same name.

    Args:
        function: Of a row; at the top of its module.
        settings: What it is called with besides.
        version: Of this package.
    """

    function: Callable[..., dict[str, Any]]
    settings: Mapping[str, Any]
    version: str = __version__

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the function makes of a row."""
        return self.function(row, **self.settings)
