"""The result files from which the page is generated."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from symphony_hf.errors import DataError
from symphony_hf.files import read_object, write_json, write_text
from symphony_hf.results import check_file_place

from .page import CHARACTERS, evidence_page

REQUIRED, RUN = "paper", ("pairs", "ablation", "theory")
_REPORT = "report.json"
SOURCES = {"pairs": _REPORT, "ablation": _REPORT, CHARACTERS: _REPORT, "theory": "theory.json"}
"""File names of the commands' results."""

_COMMANDS = dict.fromkeys(SOURCES, "`symphony ablate`") | {"theory": "`symphony theory`"}
_STUDY = ("rows", "cells", "missing", "failed", "settings", "machines", "command")
_KEYS = {
    "pairs": _STUDY,
    "ablation": _STUDY,
    CHARACTERS: (*_STUDY, "sight"),
    "theory": ("settings", "convergence", "shares", "command", "seconds"),
}

_LOCAL = ("output",)
"""Keys that hold paths of a machine, which are left out."""


class WrittenFile(NamedTuple):
    """A file of the evidence.

    Attributes:
        path: Path of the file.
        is_replaced: Whether it was there before.
    """

    path: Path
    is_replaced: bool


def add_results(folder: str | Path, about: str | None = None, **outputs: str | None) -> list[WrittenFile]:
    """Copy results of commands into the folder of result files, without paths of the machine.

    `outputs` are output folders by name of the result; None keeps the present one. Without `about`, a study has the
    sentence of an earlier study on the same text. Nothing is replaced unless a page can be generated from all of them.

    Returns:
        The files that were written.

    Raises:
        DataError: If a folder has no results or those of another command or of no finished run, or if a text has no
            sentence.
    """
    known = read_results(folder)
    added = {name: _taken(name, Path(output), known, about) for name, output in outputs.items() if output is not None}
    if CHARACTERS in added:
        study = added.pop(CHARACTERS)
        added[f"{CHARACTERS}-{Path(shlex.split(study['command'])[2]).stem}"] = study
    try:
        evidence_page({**known, **added})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"evidence: no page can be made of these results ({error!r}): they are of an older version, or "
            "cut off; run the command that makes them again"
        ) from error
    return [_written(Path(folder) / f"{name}.json", values) for name, values in added.items()]


def _written(path: Path, content: dict[str, Any] | str) -> WrittenFile:
    is_replaced = path.exists()
    if isinstance(content, str):
        write_text(path, content)
    else:
        write_json(path, content)
    return WrittenFile(path, is_replaced)


def _taken(name: str, output: Path, known: dict[str, dict[str, Any]], about: str | None) -> dict[str, Any]:
    file = output / SOURCES[name]
    values = {key: value for key, value in _read(file).items() if key not in _LOCAL}
    missing = [key for key in _KEYS[name] if key not in values]
    if missing:
        raise DataError(f"evidence: --{name}: `{file}` has no {', '.join(missing)}: {_COMMANDS[name]} writes one")
    if name == "theory":
        return values
    if not values["rows"]:
        raise DataError(
            f"evidence: --{name}: `{file}` has no finished run, only {len(values['missing'])} missing ones: finish the "
            "study first, and give its report every `--set` that it was run with"
        )
    if name == "ablation" and not values["settings"]["axes"]:
        raise DataError(f"evidence: --ablation: `{file}` is of a study without axes: take it in by --pairs")
    if (values["settings"].get("tokenizer") == "characters") != (name == CHARACTERS):
        raise DataError(f"evidence: --{name}: `{file}` is of a study of {values['settings'].get('tokenizer', 'words')}")
    text = values["settings"].get("text")
    same_text = (
        study["about"]
        for study in known.values()
        if text is not None and study.get("settings", {}).get("text") == text and "about" in study
    )
    sentence = about or next(same_text, None)
    if not sentence:
        raise DataError(f"evidence: --{name}: say by --about what text `{file}` is of, in a sentence: it is a new one")
    return {**values, "about": sentence, "command": _shown_command(values["command"], f"--{name}: `{file}`")}


def _shown_command(command: str, where: str) -> str:
    """Return the command of a study, with its file's name alone if its path is that of a machine."""
    words = shlex.split(command)
    if words[:2] != ["symphony", "ablate"] or len(words) < 3:
        raise DataError(f"evidence: {where}: its `command` is {command!r}, which names no study file: run it from one")
    if Path(words[2]).is_absolute():
        words[2] = Path(words[2]).name
    return shlex.join(words)


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Read the paper's numbers and the results of the commands that were run.

    Raises:
        DataError: If the paper's numbers are missing, or a file is not JSON.
    """
    folder = Path(folder)
    run = {name: _read(folder / f"{name}.json") for name in RUN if (folder / f"{name}.json").is_file()}
    run |= {path.stem: _read(path) for path in sorted(folder.glob(f"{CHARACTERS}-*.json"))}
    paper = read_object(
        folder / f"{REQUIRED}.json", DataError, hint="run this in the project's folder, or give --folder"
    )
    return {REQUIRED: paper, **run}


def write_evidence(
    folder: str | Path = "recipes/evidence",
    page: str | Path = "recipes/EVIDENCE.md",
    *,
    ablation: str | None = None,
    pairs: str | None = None,
    about: str | None = None,
    theory: str | None = None,
    characters: str | None = None,
) -> list[WrittenFile]:
    """Add new results, and write the page of all.

    Args:
        folder: Folder of the result files.
        page: Page to write.
        ablation: Output folder of a study with axes (`symphony ablate`) to add.
        pairs: Output folder of a study of systems without axes, such as `pairs.yaml`, to add.
        about: One sentence that describes the text of the studies.
        theory: Output folder of `symphony theory` to add.
        characters: Output folder of a study of characters to add, or to replace that of the same study file.

    Returns:
        The files that were written: the page, then those of the new results.

    Raises:
        ConfigError: If the page cannot be written.
        DataError: As `add_results`.
    """
    check_file_place(page, "evidence")
    added = add_results(folder, about, pairs=pairs, ablation=ablation, theory=theory, characters=characters)
    return [_written(Path(page), evidence_page(read_results(folder))), *added]


def describe_files(files: Sequence[WrittenFile]) -> str:
    """Describe written files in a line, with those that replaced another."""
    names = [f"{file.path.resolve()}{' (replaced)' if file.is_replaced else ''}" for file in files]
    return f"Written to {', '.join(names)}"


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, DataError, hint="give the output folder of a command that has finished")
