"""Push a checkpoint to the Hub, or write its folded form."""

import dataclasses
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from symphony_hf.checkpoints.folder import ModelFolder, open_folder
from symphony_hf.checkpoints.model_class import named_class_of, read_config
from symphony_hf.checkpoints.provenance import given_origin
from symphony_hf.checkpoints.saving import check_shard_size
from symphony_hf.checkpoints.upload import publish
from symphony_hf.errors import ConfigError, PushError
from symphony_hf.patching.folding import export_folded
from symphony_hf.results import check_folder_place


def push(
    directory: str | Path,
    repo_id: str,
    *,
    folded: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    data: str | None = None,
) -> CommitInfo:
    """Push a checkpoint, a folded checkpoint, an adapter, or a run's model to the Hub, with a model card.

    Only safetensors and the text files beside them are uploaded. Pickles and code are refused, except the state of
    Trainer and DeepSpeed, which is skipped. The text of an existing README.md, in the folder or on the Hub, is kept.
    After an interruption it can be called again; large files that were uploaded are not sent twice.

    Args:
        directory: Folder of a checkpoint, folded checkpoint, adapter, or run.
        repo_id: `NAMESPACE/NAME` on the Hub, created if missing.
        folded: Push the folded checkpoint, for software without Symphony support.
        private: Create a private repository; by default as the account is set.
        revision: Branch, created if missing.
        token: Access token of the Hub; by default that of `hf auth login` or HF_TOKEN.
        create_pr: Open a pull request instead.
        base_model: Name of the base model on the Hub, for the card; by default from the run's results or the adapter.
        license: License of the base model; by default the one on the Hub.
        data: Data set on the Hub, or a description, for the card; by default from the run's results.

    Returns:
        The commit, with its address in `commit_url`.

    Raises:
        PushError: If the folder has no model or a file that must not be shared, or the Hub refuses or is unreachable.
        ConfigError: If the settings of the graphs, or the config to fold, cannot be read.
        FoldError: If the graphs cannot be folded.
        GraphError: If the graphs cannot be read.
    """
    origin = given_origin(base_model, license, data)
    folder = open_folder(directory)
    with tempfile.TemporaryDirectory() as scratch:
        if folded:
            folder = _fold(folder, Path(scratch))
        return publish(
            folder, repo_id, origin=origin, private=private, revision=revision, token=token, create_pr=create_pr
        )


def _fold(folder: ModelFolder, scratch: Path) -> ModelFolder:
    """Return the folded form of a Symphony checkpoint, with its tokenizer and other files."""
    if folder.kind != "symphony":
        raise PushError(f"push: `{folder.path}` is not a Symphony checkpoint, so there is nothing to fold")
    plain = open_folder(export_folded(_load(folder.path, "push"), scratch / "folded", tokenizer=False))
    weights = (".safetensors", ".safetensors.index.json")
    beside = {name: file for name, file in folder.files.items() if not name.endswith(weights) and name != "config.json"}
    unfolded = dict.fromkeys(folder.files.keys() - beside.keys() - plain.files.keys(), "not folded")
    return dataclasses.replace(
        folder,
        path=plain.path,
        kind="plain",
        config=plain.config,
        files={**beside, **plain.files},
        left_out={**folder.left_out, **unfolded},
    )


def fold_checkpoint(directory: str | Path, output: str | Path, *, max_shard_size: int | str = "50GB") -> Path:
    """Write the plain form of a Symphony checkpoint, with its tokenizer.

    Args:
        directory: Folder of the Symphony checkpoint. It is left as it is.
        output: Folder to write.
        max_shard_size: Maximum size of one weights file, in bytes or as in `"5GB"`.

    Raises:
        ConfigError: If the folder holds no Symphony checkpoint, or is the output, or an argument is invalid.
        FoldError: If the graphs cannot be folded exactly.
    """
    directory, output = Path(directory).expanduser(), Path(output).expanduser()
    if directory.resolve() == output.resolve():
        raise ConfigError(f"fold: `{output}` is the checkpoint to fold, and would lose its graphs: give another folder")
    check_shard_size(max_shard_size, "fold")
    check_folder_place(output, "fold")
    if not directory.is_dir():
        raise ConfigError(f"fold: `{directory}` is not a folder: give the folder of a checkpoint")
    if getattr(read_config(directory), "symphony", None) is None:
        raise ConfigError(f"fold: `{directory}` is not a Symphony checkpoint: its config.json has no `symphony` entry")
    return export_folded(_load(directory, "fold"), output, max_shard_size=max_shard_size)


def _load(directory: Path, command: str) -> PreTrainedModel:
    config = read_config(directory)
    model_class = named_class_of(config, f"{command}: `{directory}`", PushError if command == "push" else ConfigError)
    return model_class.from_pretrained(directory, config=config, dtype="auto")
