"""inspect_model: everything that `symphony inspect` shows, of a loaded model or of a checkpoint's description."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .counts import PartCount, count_parts
from .parts import Anatomy, Routing
from .sources import empty_model
from .storage import TypeCount, held_types, stored_types


@dataclass(frozen=True)
class Inspection:
    """What a model is made of.

    Attributes:
        name: Its class.
        parts: Its parameters by part.
        types: The types of its tensors: as stored, or, of a loaded model, as in memory; None where there is no more
            than a config.
        routers: How many routers choose what.
        settings: Of its expert graphs, as its config has them; None where it has none.
    """

    name: str
    parts: list[PartCount]
    types: list[TypeCount] | None
    routers: Mapping[Routing, int]
    settings: Mapping[str, Any] | None

    @property
    def total(self) -> int:
        """All parameters, and the entries of the graphs."""
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int | None:
        """Those of them that one token uses; None where no router says how many experts that are."""
        return None if any(part.active is None for part in self.parts) else sum(part.active or 0 for part in self.parts)


def inspect_model(model: nn.Module | str | Path, revision: str | None = None) -> Inspection:
    """Look at a model's parts, types and routers.

    Args:
        model: A loaded model, wrapped or not, or one on the meta device; or a checkpoint's folder, its config.json, or
            its name on the Hub, of which no weights are read.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ConfigError: If there is no config, or it is of no model that transformers knows.
        DataError: If a checkpoint's files cannot be read.
    """
    if isinstance(model, nn.Module):
        return _inspect(model, held_types(model))
    return _inspect(empty_model(model, revision), stored_types(model, revision))


def _inspect(model: nn.Module, types: list[TypeCount] | None) -> Inspection:
    anatomy = Anatomy(model)
    bare = anatomy.modules[""]
    return Inspection(
        name=type(bare).__name__,
        parts=count_parts(model, anatomy),
        types=types,
        routers=Counter(anatomy.routers.values()),
        settings=getattr(getattr(bare, "config", None), "symphony", None),
    )
