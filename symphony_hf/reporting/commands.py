"""Command lines, told from the settings that a result has."""

from collections.abc import Mapping
from typing import Any

_OPTIONS = {"attacks": "attack", "severities": "severity"}
"""Settings whose option has another name."""


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """The command with the options of these settings, but for those that are not there."""
    words = [f"symphony {command}", str(settings["model"])]
    for name, value in settings.items():
        if name == "model" or value is None or value == []:
            continue
        option = _OPTIONS.get(name, name)
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no_{option}")
        elif isinstance(value, list) and name == "against":
            words += [f"--{option} {one}" for one in value]
        else:
            words.append(f"--{option} {','.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)
