"""`save_pretrained` and `push_to_hub` of Symphony models."""

import contextlib
import copy
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, split_state_dict_into_shards_factory
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.errors import ConfigError, PushError, nearest

from .folder import open_folder
from .hub_names import hub_name
from .model_class import nested_configs
from .provenance import given_origin
from .upload import publish


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a copy of a model's config without what `symphonize` added."""
    config = copy.deepcopy(model.config)
    for inner in nested_configs(config):
        inner.__dict__.pop("symphony", None)
    return config


def check_shard_size(size: int | str, command: str) -> None:
    """Check a `max_shard_size` before any work.

    Raises:
        ConfigError: If it is neither a number of bytes nor a size such as `5GB`.
    """
    is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if isinstance(size, str):
        with contextlib.suppress(ValueError, OverflowError):
            split_state_dict_into_shards_factory({}, get_storage_size=len, filename_pattern="", max_shard_size=size)
            is_size = re.match(r"\s*0*\.?0*[1-9]", size) is not None  # neither 0 nor negative
    if not is_size:
        raise ConfigError(
            f"{command}: `max_shard_size` must be a number of bytes from 1 on, or a size such as `5GB`, got {size!r}"
        )


_OF_CHECKPOINTS = "transformers_modules."
"""Package into which transformers loads the code of checkpoints."""

_OF_FILES = ("max_shard_size", "save_original_format")
"""Settings of `save_pretrained` that decide what is written."""

_OF_THE_HUB = ("private", "revision", "token", "create_pr", "commit_message", "commit_description", "tags")
"""Settings of an upload."""


def _refuse_variant(settings: dict[str, Any]) -> None:
    if settings.get("variant") is not None:
        raise PushError(
            f"push: `variant` is {settings['variant']!r}, and a pushed model needs weights that load without it: leave "
            "it out"
        )


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a push without those that are None, which callers pass for the default.

    Raises:
        PushError: If one is not supported.
        ConfigError: If `max_shard_size` is not a size.
    """
    _refuse_variant(settings)
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if name not in (*_OF_THE_HUB, *_OF_FILES):
            raise PushError(f"push: unknown setting `{name}`; {nearest(name, (*_OF_THE_HUB, *_OF_FILES))}")
    if "max_shard_size" in given:
        check_shard_size(given["max_shard_size"], "push")
    return given


class SymphonySaver:
    """`save_pretrained` of a Symphony model, or of a model inside it.

    Args:
        model: The model to save.
        settle: Called before anything is written, to finish what training left open.
    """

    def __init__(self, model: PreTrainedModel, settle: Callable[[], None] | None = None) -> None:
        self.model = model
        self.settle = settle
        self._dropped: list[tuple[Any, Any]] = []  # configs, and the names of code that they had

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        folder = Path(save_directory)
        if push_to_hub:
            _refuse_variant(kwargs)
        if self.settle is not None:
            self.settle()
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            # Trainer resumes without converting names from those on the Hub, and would lose the experts.
            kwargs.setdefault("save_original_format", False)
        result = type(self.model).save_pretrained(self.model, folder, is_main_process, state_dict, **kwargs)
        # Every rank of a tensor-parallel model calls this as the main process; transformers writes on the first.
        if push_to_hub and self.model.should_save_on_this_rank(is_main_process):
            # Not by the call above, which would upload no model card.
            settings = {name: kwargs[name] for name in (*_OF_THE_HUB, *_OF_FILES) if name in kwargs}
            self.model.push_to_hub(kwargs.get("repo_id", folder.name), state_dict=state_dict, **settings)
        return result

    def drop_unused_code(self) -> None:
        """Drop the names of code (`auto_map`) from the config of a model that does not run that code.

        A config on the Hub may name code beside it though transformers has the family. A model of transformers' own
        class is saved without that code, and `push` and `load_checkpoint` would refuse the names.
        """
        if type(self.model).__module__.startswith(_OF_CHECKPOINTS):
            return
        for config in nested_configs(self.model.config):
            if "auto_map" in config.__dict__:
                self._dropped.append((config, config.__dict__.pop("auto_map")))

    def put_back_unused_code(self) -> None:
        """Undo `drop_unused_code`."""
        for config, names in self._dropped:
            config.auto_map = names
        self._dropped.clear()


def give_savers(model: PreTrainedModel, settle: Callable[[], None] | None = None) -> None:
    """Give a model a `SymphonySaver` and a `SymphonyPusher`, and drop the names of code that it does not run."""
    saver = SymphonySaver(model, settle)
    saver.drop_unused_code()
    model.save_pretrained = saver  # type: ignore[method-assign]
    model.push_to_hub = SymphonyPusher(model)  # type: ignore[assignment]


def take_savers(model: Any) -> None:
    """Undo `give_savers`, if it was done."""
    saver = model.__dict__.get("save_pretrained")
    if isinstance(saver, SymphonySaver):
        saver.put_back_unused_code()
        del model.save_pretrained
        del model.push_to_hub


def mark_savers(model: Any) -> None:
    """Give a model whose config records upcycled modules, and the models inside it, a `SymphonySaver`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "upcycled", None) is not None:
            give_savers(module)


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
        state_dict: dict[str, Any] | None = None,
        base_model: str | None = None,
        license: str | None = None,
        data: str | None = None,
        **settings: Any,
    ) -> CommitInfo | None:
        """Save the model and push it.

        Args:
            repo_id: `namespace/name` on the Hub, created if missing.
            state_dict: Weights to push, such as an average; by default the model's own.
            base_model: Name of the base model on the Hub, for the card; by default what the model was loaded from.
            license: License of the base model; by default the one on the Hub.
            data: Training data: name on the Hub, or a description.
            **settings: `private`, `revision`, `token`, `create_pr`, `commit_message`, `commit_description`, `tags`; and
                of `save_pretrained` `max_shard_size` and `save_original_format`.

        Returns:
            The commit; None on the other ranks of a tensor-parallel model.

        Raises:
            PushError: If a setting is not supported, before anything is written; if the Hub refuses or is unreachable.
            ConfigError: If `max_shard_size` is not a size, before anything is written.
        """
        settings, origin = _check_settings(settings), given_origin(base_model, license, data)
        with tempfile.TemporaryDirectory() as scratch:
            of_files = {name: settings.pop(name) for name in _OF_FILES if name in settings}
            self.model.save_pretrained(scratch, state_dict=state_dict, **of_files)
            if not self.model.should_save_on_this_rank(is_main_process=True):
                return None
            folder = dataclasses.replace(open_folder(scratch), base_model=hub_name(self.model.name_or_path))
            return publish(folder, repo_id, origin=origin, **settings)


def own_config(model: PreTrainedModel) -> None:
    """Give a model its own copy of its config before it is changed, since other models may share the object."""
    copies: dict[int, Any] = {}  # with nested configs, which inner models share
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for holder in (module, module.__dict__.get("config")):  # upcycled experts hold it in their ExpertsSettings
            config = getattr(holder, "__dict__", {}).get("config")
            if id(config) in copies:
                holder.config = copies[id(config)]  # type: ignore[union-attr]
