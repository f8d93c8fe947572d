"""The result files that the page is written from."""

from pathlib import Path
from typing import Any

from ..errors import DataError
from ..json_objects import read_object
from ..unfinished import write_json, write_text
from .page import evidence_page

REQUIRED, RUN = "paper", ("pairs", "ablation", "theory")
SOURCES = {"pairs": "report.json", "ablation": "report.json", "theory": "theory.json"}
"""What the commands call their results."""

_LOCAL = ("output",)
"""What says where on a machine something was, and nothing else."""


def add_results(folder: str | Path, about: str | None = None, **outputs: str | None) -> None:
    """Copy results of commands into the folder of result files, less the paths of the machine.

    Args:
        folder: `recipes/evidence`.
        about: What the studies' text is, in a sentence; a command that takes any text cannot know. None leaves what
            is there.
        **outputs: Output folders of commands; None leaves what is there. `ablation`: of the study of the axes;
            `pairs`: of one of the three pairs, where these were run at another size; `theory`.

    Raises:
        DataError: If a folder has no results.
    """
    for name, output in outputs.items():
        if output is None:
            continue
        values, path = _read(Path(output) / SOURCES[name]), Path(folder) / f"{name}.json"
        if name != "theory":
            values["about"] = about or (_read(path).get("about", "") if path.is_file() else "")
        write_json(path, {key: value for key, value in values.items() if key not in _LOCAL})


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The paper's numbers, and those of the commands that were run.

    Raises:
        DataError: If the paper's are not there, or a file is no JSON.
    """
    folder = Path(folder)
    run = {name: _read(folder / f"{name}.json") for name in RUN if (folder / f"{name}.json").is_file()}
    return {REQUIRED: _read(folder / f"{REQUIRED}.json"), **run}


def write_evidence(folder: str | Path, page: str | Path) -> Path:
    """Write the page.

    Args:
        folder: Of the result files.
        page: `recipes/EVIDENCE.md`.

    Returns:
        The page's path.

    Raises:
        DataError: As `read_results`.
    """
    page = Path(page)
    write_text(page, evidence_page(read_results(folder)))
    return page


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, DataError, hint="give the output folder of a command that has finished")
