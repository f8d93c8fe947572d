"""Origin of a model, from the user, the results of its run, and the base model's card."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from symphony_hf.errors import PushError

from .folder import ModelFolder
from .results import Results


@dataclass(frozen=True)
class Origin:
    """Origin of a model; the card says "not known" for None.

    Args:
        base_model: Name of the base model on the Hub.
        license: License of the base model, by the Hub's identifier.
        data: Training data: name on the Hub, or a description.
    """

    base_model: str | None = None
    license: str | None = None
    data: str | None = None


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


def complete(origin: Origin | None, results: Results | None, folder: ModelFolder, api: HfApi | None) -> Origin:
    """Fill in what the user did not give, from the run's results, the adapter's config and the base model's card.

    The license is looked up on the Hub if there is a client. A given base model that is not a name on the Hub raises
    PushError.
    """
    origin = origin or Origin()
    if origin.base_model is not None and hub_name(origin.base_model) is None:
        raise PushError(f"push: the base model must be a `namespace/name` of the Hub, got `{origin.base_model}`")
    said = (
        origin.base_model,
        results.base_model if results is not None else None,
        folder.config.get("base_model_name_or_path"),
    )
    base_model = next((name for name in map(hub_name, said) if name is not None), None)
    data = origin.data or (without_folders(results.data) if results is not None else None)
    origin = dataclasses.replace(origin, base_model=base_model, data=data)
    if origin.license is None and base_model is not None and api is not None:
        return dataclasses.replace(origin, license=_license_of(base_model, api))
    return origin


def _license_of(base_model: str, api: HfApi) -> str | None:
    try:
        card = api.model_info(base_model).card_data
    except HfHubHTTPError:
        return None  # no model of that name, or not for this reader
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None
