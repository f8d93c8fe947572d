"""`save_pretrained` of a Symphony model, so that what reads the checkpoint later knows what it is."""

import contextlib
import copy
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_hf.files import write_json

from .folder import open_folder
from .provenance import Origin, hub_name
from .upload import publish

ARCHITECTURE_PREFIX = "Symphony"
"""Before the class name in a saved config's `architectures`: a server that goes by it and does not know us refuses."""


@contextlib.contextmanager
def native_aux_losses(disabled_losses: list[tuple[Any, str, float]]) -> Iterator[None]:
    """Give a model and its config the weights of its own router losses back, while its config is written."""
    restored = restore_losses(disabled_losses)
    try:
        yield
    finally:
        for holder, name in restored:
            holder.__dict__[name] = 0.0


@contextlib.contextmanager
def without_settings(model: PreTrainedModel) -> Iterator[None]:
    """Take the graph settings out of a model's config and those inside it, while a plain config is written."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    kept = [(config, config.__dict__.pop("symphony")) for config in configs.values() if "symphony" in config.__dict__]
    try:
        yield
    finally:
        for config, settings in kept:
            config.symphony = settings


def restore_losses(disabled_losses: list[tuple[Any, str, float]]) -> list[tuple[Any, str]]:
    """Give back the weights that are still silent, and say which: one that was set since then is what is wanted."""
    restored = []
    for holder, name, weight in disabled_losses:
        if holder.__dict__.get(name) == 0.0:
            holder.__dict__[name] = weight
            restored.append((holder, name))
    return restored


class SymphonySaver:
    """`save_pretrained` of a Symphony model, or of one inside it: transformers' own, and what is ours in config.json.

    Args:
        model: Whose.
        settings: Of the graph, for a model whose own config does not have them (LLaVA's language model, say). None for
            a model without graphs that is upcycled, which other software does not know either.
        disabled_losses: (holder, name, weight) of each native router loss; a saved config has it at its weight.
    """

    def __init__(
        self, model: PreTrainedModel, settings: dict[str, Any] | None, disabled_losses: list[tuple[Any, str, float]]
    ) -> None:
        self.model = model
        self.settings = settings
        self.disabled_losses = disabled_losses

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
            # Trainer resumes without the conversion to and from the names on the Hub, and would lose the experts.
            kwargs.setdefault("save_original_format", False)
        has_settings = self.settings is None or hasattr(self.model.config, "symphony")
        if not has_settings:
            self.model.config.symphony = self.settings
        try:
            with native_aux_losses(self.disabled_losses):
                result = type(self.model).save_pretrained(self.model, folder, is_main_process, *args, **kwargs)
        finally:
            if not has_settings:
                del self.model.config.symphony
        # Every rank of a tensor-parallel model calls this as the main process; transformers writes on the first.
        if not self.model.should_save_on_this_rank(is_main_process):
            return result
        if (folder / "config.json").exists():
            mark_architectures(folder / "config.json")
        if push_to_hub:
            # Not by the call above: it would upload config.json before it is marked.
            known = ("token", "commit_message", "private", "create_pr", "revision", "max_shard_size", "tags")
            settings = {name: kwargs[name] for name in known if name in kwargs}
            self.model.push_to_hub(kwargs.get("repo_id", folder.name), **settings)
        return result


def mark_savers(model: Any) -> None:
    """Have a model whose config records upcycled modules, and those inside it, saved so that others do not load it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "upcycled", None) is not None:
            module.save_pretrained = SymphonySaver(module, None, [])  # type: ignore[method-assign]
            module.push_to_hub = SymphonyPusher(module)  # type: ignore[assignment]


class SymphonyPusher:
    """`push_to_hub` of a Symphony model, or of one inside it: transformers' own arguments, and our card.

    Args:
        model: Whose.
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
        """Save the model, and push it.

        Args:
            repo_id: `namespace/name` on the Hub; made if it is not there.
            max_shard_size: Of a file of weights.
            base_model: Its name on the Hub, for the card; else what the model was loaded from, if that is one.
            license: Of the base model; else as the Hub has it.
            data: What it was trained on: a data set's name on the Hub, or a description.
            **settings: `private`, `revision`, `token`, `create_pr`, `commit_message`, `commit_description`, `tags`.

        Returns:
            The commit; None on the other ranks of a tensor-parallel model.

        Raises:
            PushError: If the Hub refuses, or is not reached.
        """
        origin = Origin(base_model or hub_name(self.model.name_or_path), license, data)
        with tempfile.TemporaryDirectory() as scratch:
            self.model.save_pretrained(scratch, max_shard_size=max_shard_size)
            if not self.model.should_save_on_this_rank(is_main_process=True):
                return None
            return publish(open_folder(scratch), repo_id, origin=origin, **settings)


def own_config(model: PreTrainedModel) -> None:
    """Give a model a config of its own, before ours goes into it: another model may be built from the same object."""
    copies: dict[int, Any] = {}  # with the configs inside it, which the models inside this one share
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for holder in (module, module.__dict__.get("config")):  # upcycled experts have it inside settings of theirs
            config = getattr(holder, "__dict__", {}).get("config")
            if id(config) in copies:
                holder.config = copies[id(config)]  # type: ignore[union-attr]


def mark_architectures(config_file: Path) -> None:
    """Have a saved config not taken for a stock model's by software that does not know us."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    names = config.get("architectures") or []
    config["architectures"] = [ARCHITECTURE_PREFIX + name.removeprefix(ARCHITECTURE_PREFIX) for name in names]
    # TRL looks into it, by attribute, when it does not know an architecture, and then takes AutoModelForCausalLM.
    config.setdefault("auto_map", {})
    write_json(config_file, config)


def unmark_architectures(config: PreTrainedConfig) -> None:
    """Give a loaded config the stock architecture's name back: what reads it from a model should find what it knows."""
    names = getattr(config, "architectures", None) or []
    config.architectures = [name.removeprefix(ARCHITECTURE_PREFIX) for name in names] or None
    if getattr(config, "auto_map", None) == {}:
        del config.auto_map
