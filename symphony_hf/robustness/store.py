"""Finished measurements on the disk, so that a run that was stopped goes on where it was."""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SymphonyWarning
from ..unfinished import replacing

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile)
"""What numpy raises for a file that is none of its own, or ends too early."""


class Store:
    """A folder of measurements, each under what decides its numbers: another model, text or setting is another entry.

    Args:
        folder: Made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, label: str, identity: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """What was measured before; None where nothing was.

        Warns:
            SymphonyWarning: If the file is damaged, which is then measured again.
        """
        path = self._path(label, identity)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except _BROKEN as error:
            warnings.warn(f"{path}: damaged, so it is measured again ({error})", SymphonyWarning, stacklevel=2)
            return None

    def save(self, label: str, identity: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a measurement: the whole of it is there, or nothing."""
        # An open file: given a name, numpy would add its suffix.
        with replacing(self._path(label, identity)) as written, written.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _path(self, label: str, identity: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{label}-{digest[:20]}.npz"
