"""Origin of a model, from the user, the results of its run, and the base model's card."""

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
        base_model: Name of the base model on the Hub; several names if an existing card has them.
        license: License of the base model, by the Hub's identifier; several if an existing card has them.
        data: Training data: name on the Hub, or a description.
    """

    base_model: str | list[str] | None = None
    license: str | list[str] | None = None
    data: str | None = None


def names(value: str | list[str] | None) -> list[str]:
    """Return the names in an entry of a card, which is one name, several or none."""
    return [value] if isinstance(value, str) else list(value or [])


def given_origin(base_model: str | None, license: str | None, data: str | None) -> Origin:
    """Return the origin that the user gives, before anything is written or created.

    Raises:
        PushError: If the base model is not a name on the Hub.
    """
    if base_model is not None and hub_name(base_model) is None:
        raise PushError(f"push: the base model must be a `namespace/name` of the Hub, got `{base_model}`")
    return Origin(base_model, license, data)


def complete(
    given: Origin | None,
    written: Origin,
    results: Results | None,
    folder: ModelFolder,
    repo_id: str,
    api: HfApi | None,
) -> Origin:
    """Return the origin for a card: what the user gives, else what an existing card says, else what can be inferred.

    It is inferred from the run's results, the folder and the base model's card. No repository is inferred to be its own
    base model. The license is that of the base model: if the user names another one, the existing card's no longer
    holds. It is looked up on the Hub if there is a client.

    Args:
        given: Origin from the user.
        written: Base model and license in the metadata of an existing card.
        results: Results of the run.
        folder: The model.
        repo_id: Name of the repository.
        api: Client of the Hub.
    """
    given = given or Origin()
    inferred = folder.base_model if results is None else results.base_model
    base_model = given.base_model or written.base_model or (inferred if inferred != repo_id else None)
    bases = names(written.base_model)
    has_other_base = given.base_model is not None and bool(bases) and given.base_model not in bases
    license = given.license or (None if has_other_base else written.license)
    if license is None and isinstance(base_model, str) and api is not None:
        license = _license_of(base_model, api)
    return Origin(base_model, license, given.data or (results.data if results is not None else None))


def _license_of(base_model: str, api: HfApi) -> str | None:
    try:
        card = api.model_info(base_model).card_data
    except HfHubHTTPError:
        return None  # no model of that name, or not for this reader
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None
