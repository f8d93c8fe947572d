"""Origin of a model, from the user, the results of its run, and the base model's card."""

import dataclasses
from dataclasses import dataclass

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from symphony_hf.errors import PushError

from .folder import ModelFolder
from .hub_names import hub_name
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


def complete(
    origin: Origin | None, results: Results | None, folder: ModelFolder, repo_id: str, api: HfApi | None
) -> Origin:
    """Fill in what the user did not give, from the run's results, the folder and the base model's card.

    No repository is inferred to be its own base model. The license is looked up on the Hub if there is a client. A
    given base model that is not a name on the Hub raises PushError.
    """
    origin = origin or Origin()
    if origin.base_model is not None and hub_name(origin.base_model) is None:
        raise PushError(f"push: the base model must be a `namespace/name` of the Hub, got `{origin.base_model}`")
    inferred = folder.base_model if results is None else results.base_model
    base_model = origin.base_model or (inferred if inferred != repo_id else None)
    data = origin.data or (results.data if results is not None else None)
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
