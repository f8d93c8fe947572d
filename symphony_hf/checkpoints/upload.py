"""Upload of a checkpoint, its card and the picture of its graphs, in one commit."""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id

from symphony_hf.compat import __version__
from symphony_hf.errors import PushError, SymphonyError
from symphony_hf.files import stale_files, write_text

from .folder import ModelFolder, open_folder
from .model_card import (
    PICTURE,
    is_card_alone,
    is_template,
    merge_cards,
    model_card,
    read_card,
    with_metadata_of,
    written_origin,
)
from .provenance import Origin, complete
from .results import Results, read_results

logger = logging.getLogger(__name__)
_README = "README.md"
_AGAIN = "run the same again, what has arrived is not sent a second time"


def publish(
    folder: ModelFolder,
    repo_id: str,
    *,
    origin: Origin | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload a folder's model with its card in one commit, so that readers never see a partial model.

    After an interruption it can be called again; large files that were uploaded are not sent twice. Files of an earlier
    push that loaders would take for parts of this model are deleted in the same commit, see `stale_files`. Arguments
    are those of `push` and of `huggingface_hub.HfApi.create_commit`; `tags` are added to the card.

    Raises:
        PushError: If there is no token, or the folder's results or README cannot be read, before the repository is
            created; if the Hub refuses, or the connection fails. No message contains the token.
    """
    secret = _token(token)
    results = read_results(folder)
    local = _local_readme(folder)
    api = HfApi(token=secret, library_name="symphony_hf", library_version=__version__)
    with _hub_errors(api, repo_id, secret), tempfile.TemporaryDirectory() as scratch:
        picture = _draw(folder, Path(scratch) / PICTURE) if folder.graphs else None
        repo_id = _prepare(api, repo_id, private, revision)
        there = set(api.list_repo_files(repo_id, revision=revision))
        files = {name: file for name, file in folder.files.items() if name != _README}
        if picture is not None:
            files[PICTURE] = picture

        def read(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, revision=revision, token=api.token, endpoint=api.endpoint))

        remote = read(_README).read_text(encoding="utf-8") if _README in there else None
        readme = _readme(folder, repo_id, results, local, remote, given=origin, tags=tags, api=api)
        stale = stale_files(there, files, read)
        for name, reason in folder.left_out.items():
            logger.warning("left out: %s (%s)", name, reason)
        return api.create_commit(
            repo_id,
            [
                CommitOperationAdd(_README, readme.encode()),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
                *(CommitOperationDelete(path) for path in sorted(stale)),
            ],
            commit_message=commit_message or "Upload model with symphony_hf",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def write_card(directory: str | Path, name: str) -> Path:
    """Write the model card of a run into its model's folder, and return its path. `name` has no namespace.

    Each push rewrites the card; text that somebody adds around it stays.

    Raises:
        PushError: If there is no model, or a file that must not be shared.
    """
    folder = open_folder(directory)
    results = read_results(folder)
    text = _readme(folder, f"NAMESPACE/{name}", results, _local_readme(folder))
    if folder.graphs:
        _draw(folder, folder.path / PICTURE)
    readme = folder.path / _README
    write_text(readme, text)
    return readme


def _token(token: str | bool | None) -> str:
    found = get_token() if token is None or token is True else token
    if not found:
        raise PushError("push: no access token of the Hub: `hf auth login`, or set HF_TOKEN, to one with write access")
    if not re.fullmatch(r"[!-~]+", found):
        # The HTTP library would say so too, with the token in its message.
        raise PushError("push: the access token has blanks or other signs in it that no token has: copy it again")
    return found


def _prepare(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Create the repository and the branch, and return the repository's full name."""
    validate_repo_id(repo_id)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise PushError(f"{repo_id} is there already, and public: make it private on the Hub, or take another name")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _local_readme(folder: ModelFolder) -> str | None:
    """Return the folder's README, if somebody wrote one. Text or metadata that cannot be read raises PushError."""
    file = folder.files.get(_README)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PushError(f"`{file}`: it is not text in UTF-8 ({error}): mend it, or move it away") from error
    if is_template(text):
        return None
    read_card(text, f"`{file}`")
    return text


def _readme(
    folder: ModelFolder,
    repo_id: str,
    results: Results | None,
    local: str | None,
    remote: str | None = None,
    *,
    given: Origin | None = None,
    tags: list[str] | None = None,
    api: HfApi | None = None,
) -> str:
    """Return the card merged into the folder's README, else into the one on the Hub, else alone.

    A README of the folder that is a run's card alone gives its metadata to the one on the Hub, which keeps its text.
    """
    in_folder, on_hub = f"`{folder.files.get(_README)}`", f"{_README} on the Hub"
    if remote is not None and is_template(remote):
        remote = None
    if local is not None and remote is not None and is_card_alone(local):
        remote, local = with_metadata_of(remote, read_card(local, in_folder), where=on_hub), None
    if local is not None and remote not in (None, local):
        logger.warning("%s is replaced by the folder's; its history has it", on_hub)
    existing, where = (remote, on_hub) if local is None else (local, in_folder)
    written = Origin() if existing is None else written_origin(existing, where)
    origin = complete(given, written, results, folder, repo_id, api)
    card = model_card(folder, repo_id, origin, results, tags or [])
    return str(card) if existing is None else merge_cards(existing, card, where)


def _draw(folder: ModelFolder, path: Path) -> Path:
    from symphony_hf.diagnostics.plots.heat_maps import plot_graphs  # matplotlib is slow to import

    return plot_graphs(folder.graphs, path)


@contextlib.contextmanager
def _hub_errors(api: HfApi, repo_id: str, secret: str) -> Iterator[None]:
    """Turn errors of the Hub and the connection into a PushError without the token.

    The original error is dropped, since a server may repeat the token in its answer.
    """
    try:
        yield
    except SymphonyError:
        raise
    except (HTTPError, RuntimeError, ValueError, OSError) as error:
        raise PushError(_explain(error, api.endpoint, repo_id).replace(secret, "<token>")) from None


def _explain(error: BaseException, endpoint: str, repo_id: str) -> str:
    while error.__cause__ is not None and not isinstance(error, HTTPError):
        error = error.__cause__  # an upload's error says only which file
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"push: {endpoint} refuses the access token (401): `hf auth login`, or set HF_TOKEN, to a valid one"
    if status == 403:
        return (
            f"push: the access token may not write to {repo_id} on {endpoint} (403): take one with write access to it"
        )
    if isinstance(error, HTTPError) and status is None:
        return f"push: the connection to {endpoint} failed ({type(error).__name__}: {error}): {_AGAIN}"
    return f"push: {repo_id} on {endpoint}: {type(error).__name__}: {' '.join(str(error).split())}"
