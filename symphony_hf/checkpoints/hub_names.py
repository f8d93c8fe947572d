"""Names on the Hub, and how they are told from local paths.

It stands alone because a run's results and its model card use it.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def hub_name(name: str | None) -> str | None:
    """Return the name if it is a `namespace/name` on the Hub; None if it is a path or not a name."""
    if name is None or name.count("/") != 1 or Path(name).exists() or name.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if re.search(r"\.(txt|md|json|jsonl|csv|parquet)$", name) else name


def without_folders(path: str) -> str:
    """Return a data set's name on the Hub as it is, and a path without its folders."""
    name = path.partition(":")[0]  # `owner/name:configuration`
    return name if hub_name(name) is not None else re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def origin_record(model: str | None, data: str | None) -> dict[str, Any]:
    """Return a run's base model and data as its results record them: None for a local model, or data without a path.

    It is called where the run is trained. Where the model is pushed, a path may be missing, and look like a name.
    """
    path = None if data == "embedded" else data
    return {"base_model": hub_name(model), "data": None if path is None else without_folders(path)}
