"""upcycle_modules: turn a model's MLPs into mixtures of experts, recorded in its config."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.checkpoints.saving import mark_savers, own_config
from symphony_hf.errors import ConfigError, PatchError, UpcycleError, nearest
from symphony_hf.models.dense_mlp import MlpParts, read_mlp
from symphony_hf.models.routers import ROUTERS, TEMPERATURE, CosineRouter, LinearRouter
from symphony_hf.models.upcycled_moe import UpcycledMoE
from symphony_hf.settings import from_mapping

from .expert_graph import is_adapted

FORMAT = 1
"""Format of the record in a checkpoint's config.json."""


@dataclass(frozen=True, kw_only=True)
class UpcycledSettings:
    """Record of `upcycle_modules`, stored in config.json under `upcycled`.

    Args:
        modules: The names of the modules that became mixtures of experts.
        num_experts: Number of experts in each.
        top_k: Experts a token.
        head: `smoe` or `xmoe`.
    """

    modules: list[str]
    num_experts: int
    top_k: int
    head: str = "smoe"

    def __post_init__(self) -> None:
        named = isinstance(self.modules, list) and self.modules and all(isinstance(n, str) and n for n in self.modules)
        if not named:
            raise ConfigError(f"upcycled: `modules` must be names of modules, got {self.modules!r}")
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
                raise ConfigError(f"upcycled: `{name}` must be a number of experts from 1 on, got {value!r}")
        if self.num_experts < 2 or self.top_k > self.num_experts:
            raise ConfigError(f"upcycled: top-{self.top_k} of {self.num_experts} experts is no mixture of experts")
        if self.head not in ROUTERS:
            raise ConfigError(f"upcycled: `head` is {self.head!r}; {nearest(str(self.head), ROUTERS)}")

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> "UpcycledSettings":
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: If it is something else, or of a newer format.
        """
        where = "config.json: upcycled"
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, Mapping) else values
            raise ConfigError(f"{where}: format {FORMAT} was expected, found {found!r}: upgrade symphony_hf")
        return from_mapping(cls, {name: value for name, value in values.items() if name != "format"}, where)


def upcycle_modules(
    model: PreTrainedModel,
    patterns: str | Sequence[str],
    *,
    num_experts: int = 4,
    top_k: int = 2,
    head: str = "smoe",
    seed: int = 0,
    router_std: float = 0.02,
    noise: float = 0.0,
) -> PreTrainedModel:
    """Turn MLPs of a model into mixtures of experts, in place: for modules that have no MoE family of their own.

    CLIP's and SigLIP's MLPs, LLaVA's projector, and any other of two linear maps, or of three with a gate. Every
    expert begins as a copy of the MLP and a token's weights sum to 1, so the model computes what it did, but for
    rounding, until it is trained. `symphonize` then gives the new routers a graph. The model's config records it;
    transformers' own classes restore it.

    Args:
        model: A transformers model, not yet symphonized.
        patterns: Shell-style patterns of module names, such as `*multi_modal_projector`.
        num_experts: E.
        top_k: Experts a token.
        head: `smoe`: a linear router. `xmoe`: cosines to expert embeddings.
        seed: Seed of the routers and the noise.
        router_std: Standard deviation of the routers' initial weights.
        noise: Standard deviation of what is added to the copies, relative to that of each weight. With noise the model
            does not compute what it did.

    Returns:
        The same model.

    Raises:
        UpcycleError: If nothing matches, or something that matches is no MLP; nothing has changed then.
        PatchError: If the model is symphonized, upcycled already, or has adapters.
        ConfigError: If a setting is out of range.

    Source: sparse upcycling, arXiv 2212.05055; of projector and vision tower, LibMoE. Deviation: none.
    """
    found = _find(model, [patterns] if isinstance(patterns, str) else list(patterns))
    settings = UpcycledSettings(modules=list(found), num_experts=num_experts, top_k=top_k, head=head)
    for name, value in (("router_std", router_std), ("noise", noise)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"upcycle_modules: `{name}` must be a number from 0 on, got {value!r}")
    own_config(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parts in found.items():
        replaced = _replace(model, name, parts, settings)
        _initialize(replaced, router_std, noise, generator)
    model.config.upcycled = settings.to_dict()
    mark_savers(model)
    return model


def _find(model: PreTrainedModel, patterns: list[str]) -> dict[str, MlpParts]:
    if getattr(model.config, "symphony", None) is not None:
        raise PatchError("upcycle_modules: the model is symphonized already: upcycle first, then symphonize")
    if getattr(model.config, "upcycled", None) is not None:
        raise PatchError("upcycle_modules: the model is upcycled already: name all modules at once")
    if is_adapted(model):
        raise PatchError("upcycle_modules: the model has PEFT's adapters: upcycle first, then add them")
    modules = dict(model.named_modules())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise UpcycleError(
                f"upcycle_modules: `{pattern}` matches no module of {type(model).__name__}; {nearest(pattern, modules)}"
            )
    matching = [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: read_mlp(name, modules[name]) for name in matching}


def _replace(model: nn.Module, name: str, parts: MlpParts, settings: UpcycledSettings) -> UpcycledMoE:
    parent, _, own_name = name.rpartition(".")
    made = UpcycledMoE(parts, settings.num_experts, settings.top_k, settings.head, getattr(model, "config", None))
    holder = model.get_submodule(parent)
    made.train(getattr(holder, own_name).training)
    setattr(holder, own_name, made)
    return made


@torch.no_grad()
def _initialize(module: UpcycledMoE, router_std: float, noise: float, generator: torch.Generator) -> None:
    """Draw the router, and what noise there is. On the CPU, so that a seed gives the same on every device."""

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    router = module.gate
    if isinstance(router, LinearRouter):
        router.linear.weight.copy_(router_std * draw(router.linear.weight.shape))
    elif isinstance(router, CosineRouter):
        router.reduction.weight.copy_(router_std * draw(router.reduction.weight.shape))
        router.embeddings.weight.copy_(draw(router.embeddings.weight.shape))
        router.log_temperature.fill_(math.log(TEMPERATURE))
        nn.init.eye_(router.mix.weight)
    if noise > 0:
        for parameter in module.experts.parameters():
            parameter.add_((noise * parameter.float().std().cpu() * draw(parameter.shape)).to(parameter))


def restore_modules(model: PreTrainedModel) -> None:
    """Make the modules that a config records, before their weights are loaded.

    A model inside the one that the record is of has shorter names for the same modules, and may have been built first.

    Raises:
        ConfigError: If the record is none, or names a module that is not there.
        UpcycleError: If one is no MLP.
    """
    settings = UpcycledSettings.from_dict(model.config.upcycled)
    modules = dict(model.named_modules())
    for recorded in settings.modules:
        name = recorded
        while name and name not in modules:
            name = name.partition(".")[2]
        if not name:
            raise ConfigError(f"config.json: upcycled: {type(model).__name__} has no module `{recorded}`")
        if not isinstance(modules[name], UpcycledMoE):
            made = _replace(model, name, read_mlp(name, modules[name]), settings)
            _initialize(made, 0.02, 0.0, torch.Generator().manual_seed(0))
            made.awaits_checkpoint = made.experts.down_proj.is_meta  # type: ignore[union-attr, assignment]
    mark_savers(model)


def check_loaded(model: PreTrainedModel) -> None:
    """Refuse a checkpoint that did not have all weights of the experts: they would be whatever was in memory.

    Raises:
        UpcycleError: If one is missing.
    """
    missing = [
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if isinstance(module, UpcycledMoE) and module.awaits_checkpoint
        for parameter_name, parameter in module.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
    ]
    if missing:
        raise UpcycleError(
            f"{type(model).__name__}: its config.json says that modules were upcycled, but the checkpoint lacks "
            f"{len(missing)} of their weights ({missing[0]}, ...): it is of the dense model, or incomplete"
        )
    for module in model.modules():
        if isinstance(module, UpcycledMoE):
            module.awaits_checkpoint = False
