"""`save_pretrained` and `push_to_hub` of Symphony models, and the mark that their saved configs carry."""

import contextlib
import copy
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig, PreTrainedModel

from .folder import open_folder
from .provenance import Origin, hub_name
from .upload import publish

ARCHITECTURE_PREFIX = "Symphony"
"""Prefix of the class name in a saved config's `architectures`, so that other software refuses to load it."""


@contextlib.contextmanager
def without_settings(model: PreTrainedModel, named: Sequence[Any]) -> Iterator[None]:
    """Remove what `symphonize` added to a model's configs while a plain config is written.

    Args:
        model: The model.
        named: Configs in which `symphonize` named a model class.
    """
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    kept = [(config, config.__dict__.pop("symphony")) for config in configs.values() if "symphony" in config.__dict__]
    names = [config.architectures for config in named]
    for config in named:
        config.architectures = None
    try:
        yield
    finally:
        for config, name in zip(named, names, strict=True):
            config.architectures = name
        for config, settings in kept:
            config.symphony = settings


class SymphonySaver:
    """`save_pretrained` of a Symphony model, or of a model inside it.

    Args:
        model: The model to save.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        folder = Path(save_directory)
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # Trainer resumes without converting names from those on the Hub, and would lose the experts.
            kwargs.setdefault("save_original_format", False)
        result = type(self.model).save_pretrained(self.model, folder, is_main_process, *args, **kwargs)
        # Every rank of a tensor-parallel model calls this as the main process; transformers writes on the first.
        if push_to_hub and self.model.should_save_on_this_rank(is_main_process):
            # Not by the call above, which would upload no model card.
            known = ("token", "commit_message", "private", "create_pr", "revision", "max_shard_size", "tags")
            settings = {name: kwargs[name] for name in known if name in kwargs}
            self.model.push_to_hub(kwargs.get("repo_id", folder.name), **settings)
        return result


def mark_savers(model: Any) -> None:
    """Give a model whose config records upcycled modules, and the models inside it, a `SymphonySaver`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "upcycled", None) is not None:
            module.save_pretrained = SymphonySaver(module)  # type: ignore[method-assign]
            module.push_to_hub = SymphonyPusher(module)  # type: ignore[assignment]


class SymphonyPusher:
    """`push_to_hub` of a Symphony model, or of a model inside it, with a model card.

    Args:
        model: The model to push.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        base_model: str | None = None,
        license: str | None = None,
        data: str | None = None,
        **settings: Any,
    ) -> CommitInfo | None:
        """Save the model and push it.

        Args:
            repo_id: `namespace/name` on the Hub, created if missing.
            max_shard_size: Maximum size of one weights file.
            base_model: Name of the base model on the Hub, for the card; by default what the model was loaded from.
            license: License of the base model; by default the one on the Hub.
            data: Training data: name on the Hub, or a description.
            **settings: `private`, `revision`, `token`, `create_pr`, `commit_message`, `commit_description`, `tags`.

        Returns:
            The commit; None on the other ranks of a tensor-parallel model.

        Raises:
            PushError: If the Hub refuses or is unreachable.
        """
        origin = Origin(base_model or hub_name(self.model.name_or_path), license, data)
        with tempfile.TemporaryDirectory() as scratch:
            self.model.save_pretrained(scratch, max_shard_size=max_shard_size)
            if not self.model.should_save_on_this_rank(is_main_process=True):
                return None
            return publish(open_folder(scratch), repo_id, origin=origin, **settings)


def own_config(model: PreTrainedModel) -> None:
    """Give a model its own copy of its config before it is changed, since other models may share the object."""
    copies: dict[int, Any] = {}  # with nested configs, which inner models share
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for holder in (module, module.__dict__.get("config")):  # upcycled experts hold it in their ExpertsSettings
            config = getattr(holder, "__dict__", {}).get("config")
            if id(config) in copies:
                holder.config = copies[id(config)]  # type: ignore[union-attr]


def wrap_to_json_file(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method that writes configs so that those of Symphony models are always marked.

    The mark keeps other software from mistaking such a config for a stock model's.
    """

    @functools.wraps(original)
    def to_json_file(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(self, "symphony", None) is None and getattr(self, "upcycled", None) is None:
            return original(self, *args, **kwargs)
        with _marked(self):
            return original(self, *args, **kwargs)

    to_json_file._symphony_wrap = True  # type: ignore[attr-defined]
    return to_json_file


@contextlib.contextmanager
def _marked(config: Any) -> Iterator[None]:
    names = config.architectures
    config.architectures = [ARCHITECTURE_PREFIX + name.removeprefix(ARCHITECTURE_PREFIX) for name in names or ()]
    # TRL reads it, by attribute, when it does not know an architecture, and then takes AutoModelForCausalLM.
    has_map = hasattr(config, "auto_map")
    if not has_map:
        config.auto_map = {}
    try:
        yield
    finally:
        config.architectures = names
        if not has_map:
            del config.auto_map


def unmark_architectures(config: PreTrainedConfig) -> None:
    """Restore the stock architecture name in a loaded config, for software that reads it from the model."""
    names = getattr(config, "architectures", None) or []
    config.architectures = [name.removeprefix(ARCHITECTURE_PREFIX) for name in names] or None
    if getattr(config, "auto_map", None) == {}:
        del config.auto_map
