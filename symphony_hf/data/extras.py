"""Packages that only one kind of data needs, and that are named when they are missing."""

import importlib.util

from ..errors import DataError

_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "imagecorruptions": "imagecorruptions-imaug"}
"""Module -> the package that it comes with, where their names differ."""


def require(module: str, purpose: str, extra: str = "vision") -> None:
    """Refuse to begin without a module.

    Args:
        module: That must be importable.
        purpose: What for, in the error message.
        extra: Of this package, that installs it.

    Raises:
        DataError: If it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        package = _PACKAGES.get(module, module)
        raise DataError(f"{purpose} need {package}, which is not installed: pip install 'symphony-hf[{extra}]'")
