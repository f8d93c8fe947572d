"""Command lines, told from the settings that a result has."""

import shlex
from collections.abc import Mapping
from typing import Any

_OPTIONS = {"attacks": "attack", "severities": "severity"}
"""Settings whose option has another name."""


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """The command with the options of these settings, but for those that are not there, quoted for a shell."""
    words = ["symphony", command, str(settings["model"])]
    for name, value in settings.items():
        option = f"--{_OPTIONS.get(name, name)}"
        if name == "model" or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no_{name}")
        elif isinstance(value, list) and name == "against":
            words += [word for one in value for word in (option, str(one))]
        elif name == "attacks" and not value:
            words += [option, "none"]  # without the option there would be the usual one
        elif value != []:
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
