"""ExpertGraph: the child `symphony` of a Symphony router. It holds the one thing that is saved."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import GraphError
from symphony_hf.routing.graph import (
    adjacency_problems,
    initial_adjacency,
    mix_with_identity,
    routing_residual,
    symmetrize,
    transition_matrix,
    without_autocast,
)
from symphony_hf.routing.smoothing import add_residual, add_residual_to_weight, smooth_scores, smooth_sigmoid_scores

_NOT_LOADED = -1
"""Number of updates of a graph that a checkpoint has yet to be loaded into."""


class ExpertGraph(nn.Module):
    """A router's co-selection graph of experts, and the matrix A that it routes with.

    Args:
        num_experts: E.
        top_k: Experts chosen per token, K.
        config: How the graph is used and learned.
        device: Where the router's weight is.

    Attributes:
        adjacency: The moving average of co-selections. Shape: (num_experts, num_experts), float32 under every
            cast of the model. A buffer; a parameter when `config.graph` is `learned`.
        updates: How many updates the graph has seen: an int64 scalar buffer, by which the strength warms up.
    """

    # Buffer names must not contain `weight`, `experts` or `e_score`: checkpoint conversion would rename them.
    adjacency: Tensor
    updates: Tensor

    def __init__(
        self, num_experts: int, top_k: int, config: SymphonyConfig, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.config = config
        adjacency_EE = initial_adjacency(num_experts, top_k, device)
        if config.graph == "learned":
            self.adjacency = nn.Parameter(adjacency_EE)
        else:
            self.register_buffer("adjacency", adjacency_EE)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None  # settings, adjacency, and the residual of it
        # A checkpoint is being loaded into this graph when it is born without storage.
        self.awaits_checkpoint = self.adjacency.is_meta

    @torch.no_grad()
    def mark_not_loaded(self) -> None:
        """Note that a checkpoint's graph has yet to be copied into this one, by whatever loads the weights."""
        self.awaits_checkpoint = True
        self.updates.fill_(_NOT_LOADED)

    def _check_loaded(self) -> None:
        if self.updates.is_meta or int(self.updates) == _NOT_LOADED:
            raise GraphError(
                "a checkpoint was loaded without its expert graphs: accelerate leaves buffers out of modules that it "
                "offloads to disk. Give `load_checkpoint_and_dispatch` offload_buffers=True, or load with "
                "`from_pretrained(..., device_map=...)`"
            )
        self.awaits_checkpoint = False

    @torch.no_grad()
    def reset(self) -> None:
        """Reset to the start, where the router computes bit for bit what the base router computes."""
        self.adjacency.copy_(initial_adjacency(self.num_experts, self.top_k, self.adjacency.device))
        self.updates.zero_()

    def strength(self) -> Tensor | float:
        """Return the current strength, which ramps up linearly over `warmup_steps` updates."""
        if self.config.warmup_steps == 0:
            return self.config.strength
        return self.config.strength * (self.updates / self.config.warmup_steps).clamp(max=1.0)

    def forward(self, tensor: Tensor, kind: str = "weight") -> Tensor:
        """Apply the graph. A call, not an attribute read, so that the hooks of accelerate and PEFT take part.

        Args:
            tensor: The router's weight or bias, (num_experts, ...), or its logits, (..., num_experts).
            kind: `weight`; `logits`; or, where scores are smoothed, the function that makes them of the logits:
                `softmax` or `sigmoid`.

        Returns:
            The smoothed tensor. Same shape and type.
        """
        if self.awaits_checkpoint:
            self._check_loaded()
        if kind == "weight":
            return add_residual_to_weight(tensor, self.residual())
        if kind == "logits":
            if tensor.dim() == 2 and tensor.dtype == torch.float32:
                return add_residual(tensor, self.residual())
            smoothed = add_residual(tensor.reshape(-1, self.num_experts), self.residual())
            return smoothed.view_as(tensor).to(tensor.dtype)
        smooth = smooth_sigmoid_scores if kind == "sigmoid" else smooth_scores
        return smooth(tensor, self.transition())

    def residual(self) -> Tensor:
        """Return A - I, which a forward adds. Shape: (num_experts, num_experts), float32.

        On a CPU the last one is kept with a copy of the adjacency, and is returned again while the adjacency has equal
        numbers. Writes through `.data`, collectives and memory maps do not bump a version counter, so nothing else says
        whether it changed. On other devices, comparing would wait for the device, and it is computed at every call.
        """
        adjacency_EE, strength = self.symmetrized(), self.strength()
        can_keep = _is_plain_on_cpu(adjacency_EE)
        if can_keep:
            strength = float(strength)
        settings = strength, self.config.normalization, self.config.self_loops
        if can_keep and self._kept is not None:
            kept_settings, kept_EE, residual_EE = self._kept
            is_usable = torch.is_inference_mode_enabled() or not residual_EE.is_inference()
            if kept_settings == settings and is_usable and torch.equal(kept_EE, adjacency_EE):
                return residual_EE
        if can_keep:
            adjacency_EE = adjacency_EE.clone()  # another thread may write into it
        with without_autocast(adjacency_EE):
            residual_EE = routing_residual(adjacency_EE, *settings)
        if can_keep:
            self._kept = settings, adjacency_EE, residual_EE
        return residual_EE

    def transition(self) -> Tensor:
        """Compute the matrix A = (1 - strength) I + strength P. Shape: (num_experts, num_experts), float32."""
        adjacency_EE = self.symmetrized()
        with without_autocast(adjacency_EE):
            transition_EE = transition_matrix(adjacency_EE, self.config.normalization, self.config.self_loops)
            return mix_with_identity(transition_EE, self.strength())

    def symmetrized(self) -> Tensor:
        """Return the graph as routing uses it: a learned one is made symmetric and non-negative first.

        Bit for bit the adjacency where it is so already. Shape: (num_experts, num_experts), float32.
        """
        if self.config.graph != "learned" or self.adjacency.dim() != 2:  # ZeRO-3 leaves a row of a parameter, or less
            return self.adjacency
        return symmetrize(self.adjacency)

    @property
    def is_partitioned(self) -> bool:
        """Whether this rank holds a part of a learned graph, as under ZeRO-3 and FSDP2 between forwards."""
        return self.adjacency.dim() != 2 or hasattr(self.adjacency, "full_tensor")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Symmetrize a learned graph in place: what is saved is the graph as used, and its live storage."""
        if self.config.graph == "learned" and not self.adjacency.is_meta and not self.is_partitioned:
            with torch.no_grad():
                self.adjacency.data.copy_(self.symmetrized())  # `.data`: a backward may still be to come
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a graph with impossible values, by whatever loads it. The last of `args` is the list of errors."""
        loaded = state_dict.get(f"{prefix}adjacency")
        if loaded is not None and not (loaded.is_meta or self.is_partitioned or hasattr(loaded, "full_tensor")):
            learned = self.config.graph == "learned" and loaded.shape == self.adjacency.shape
            problems = adjacency_problems(symmetrize(loaded) if learned else loaded, self.num_experts)
            if problems:
                args[-1].append(f"the graph {prefix}adjacency is not usable: {'; '.join(problems)}.")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.adjacency.dtype != torch.float32:  # `assign=True` puts the loaded tensor in its place
            self.widen()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpertGraph":
        """Follow the model to another device, but keep the graph in float32 when the model is cast."""
        # A cast puts other numbers into a parameter, which stays the same object.
        kept, gradient = self.adjacency.detach(), self.adjacency.grad
        gradient = None if gradient is None else gradient.detach()
        super()._apply(fn, recurse)
        if self.adjacency.dtype != torch.float32:
            self.widen(kept, gradient)
        return self

    def widen(self, values: Tensor | None = None, gradient: Tensor | None = None) -> None:
        """Make the graph float32 again.

        Args:
            values: Values from before the cast. If None, the current ones.
            gradient: Gradient from before the cast. If None, the current one.
        """
        values = self.adjacency if values is None else values
        gradient = self.adjacency.grad if gradient is None else gradient
        device = self.adjacency.device
        restored = values.detach().to(device, torch.float32)
        if isinstance(self.adjacency, nn.Parameter):
            self.adjacency.data = restored
            self.adjacency.grad = None if gradient is None else gradient.detach().to(device, torch.float32)
        else:
            self.adjacency = restored

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without what is computed again."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, graph={self.config.graph}"


def _is_plain_on_cpu(adjacency_EE: Tensor) -> bool:
    """Whether a graph's numbers can be compared now: no parameter, nothing that is traced or transformed."""
    is_plain = type(adjacency_EE) is Tensor and adjacency_EE.is_cpu and not adjacency_EE.requires_grad
    return is_plain and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_functional())


def is_functional() -> bool:
    """Whether a transform of `torch.func` is running, whose backward our hooks and losses cannot take part in."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def active_graph(module: nn.Module) -> ExpertGraph:
    """Return the graph in use: the module itself, or the active copy in PEFT's `modules_to_save` wrapper around it.

    Args:
        module: A router's child `symphony`.
    """
    if isinstance(module, ExpertGraph):
        return module
    graph = _active_module(module)
    assert isinstance(graph, ExpertGraph)
    return graph


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has PEFT adapters, in it or around it."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def kept_in_adapters(model: nn.Module) -> set[int]:
    """Return the identities of the modules in the copies that adapters keep through `modules_to_save`."""
    copies: Any = [wrapper.modules_to_save for wrapper in model.modules() if "modules_to_save" in wrapper._modules]
    return {id(module) for copy in copies for module in copy.modules()}


def put_aside(modules: Iterable[nn.Module]) -> set[int]:
    """Return the identities of the modules that PEFT's `modules_to_save` wrappers hold but do not run now.

    Args:
        modules: All modules of a model.
    """
    aside: set[int] = set()
    for wrapper in modules:
        if "modules_to_save" in wrapper._modules:
            active = _active_module(wrapper)
            held: Any = (wrapper.original_module, *wrapper.modules_to_save.values())  # type: ignore[operator, union-attr]
            aside.update(id(module) for copy in held if copy is not active for module in copy.modules())
    return aside


def _active_module(wrapper: nn.Module) -> nn.Module:
    adapters: Any = [] if wrapper.disable_adapters else wrapper.active_adapters
    return wrapper.modules_to_save[adapters[0]] if adapters else wrapper.original_module  # type: ignore[index, operator, return-value]
