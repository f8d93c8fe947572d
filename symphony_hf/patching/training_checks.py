"""Checks for failures that would otherwise be silent: optimizers, adapters, losses, the ranks' graphs."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import PatchError, SymphonyWarning

from .correction_bias import adapter_remedy
from .expert_graph import ExpertGraph, is_adapted, kept_in_adapters
from .observations import Observations
from .training_state import TrainingState, num_ranks

RANK_CHECK_EVERY = 100
"""Commits between two looks at whether all ranks have the same graphs."""

LOSES_COUNTS = (
    "lose all counts but one replica's: start one process per GPU with `accelerate launch`, or set "
    "CUDA_VISIBLE_DEVICES to one GPU"
)
"""Effect of DataParallel on a Symphony model, and the remedy, for error messages."""

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""An odd number without pattern, as an int64: what is multiplied by it can be told apart afterwards."""


def left_out(
    routers: Iterable[tuple[str, nn.Module]], parameters: Iterable[nn.Parameter], held: set[int]
) -> tuple[list[str], int]:
    """Find router parameters that should be trained but that no optimizer holds.

    Args:
        routers: Routers with their names.
        parameters: Parameters of the model around them.
        held: The identities of what the optimizers hold.

    Returns:
        Their names, and of how many. None are missing where the optimizers hold none of the model's own parameters:
        sharded ones hold flat copies.
    """
    named = [
        (f"{name}.{parameter_name}", parameter)
        for name, router in routers
        for parameter_name, parameter in router.named_parameters()
        if parameter.requires_grad
    ]
    missing = [name for name, parameter in named if id(parameter) not in held]
    if missing and any(id(parameter) in held for parameter in parameters):
        return missing, len(named)
    return [], len(named)


def fingerprint(graph: ExpertGraph) -> Tensor:
    """Hash a graph's bits by position, with its number of updates, to an int64 scalar. Sums wrap around."""
    bits = graph.adjacency.detach().contiguous().view(torch.int32).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _MULTIPLIER
    mixed = (bits + 1) * (places | 1)
    return (mixed ^ (mixed >> 29)).sum() + graph.updates.to(bits.device) * _MULTIPLIER


def num_differing(graphs: Sequence[ExpertGraph], device: torch.device) -> int:
    """Count the graphs that differ between ranks. One all-reduce, in which every rank must take part."""
    own = torch.stack([fingerprint(graph).cpu() for graph in graphs])
    extremes = torch.cat([own, ~own]).to(device)  # `~` turns the order around, and cannot overflow
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(own)], ~extremes[len(own) :]
    return int((highest != lowest).sum())


def _name_of_holder(model: nn.Module, tensor: Tensor) -> str:
    """Return the name of the module that holds a tensor, without that of PEFT's wrapper around it."""
    named = (*model.named_buffers(), *model.named_parameters())
    name = next(name for name, held in named if held is tensor)
    return name.rpartition(".")[0].removesuffix(".original_module")


def is_trained(module: nn.Module) -> bool:
    """Whether a parameter of a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


class Stack(Protocol):
    """Attributes of a decoder stack's counter that the checks read."""

    owner: nn.Module

    @property
    def routers(self) -> list[Any]: ...

    @property
    def counted_graphs(self) -> list[ExpertGraph]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def placed(self) -> Any: ...


class TrainingChecks:
    """Warnings about trainings that would otherwise go wrong silently, each given once: one per model.

    Attributes:
        num_skipped: Number of times that a router's logits were not finite in a training forward, on the graphs'
            device; None before the first update.
    """

    def __init__(self) -> None:
        self.num_commits = 0
        self.num_skipped: Tensor | None = None
        self._warned: set[str] = set()
        self._checked: tuple[int, ...] = ()  # the graphs that moved when adapters were last checked

    def recheck_adapters(self) -> None:
        """Check adapters again at the next commit, as one was added."""
        self._checked = ()

    def warn_once(self, message: str) -> None:
        """Warn, unless the same message has been given before."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, SymphonyWarning, stacklevel=3)

    def refuse_join(self) -> None:
        """Refuse uneven numbers of batches, which `Join` allows: every commit sums the counts of all ranks.

        Raises:
            PatchError: If the forward under way is DistributedDataParallel's, inside `Join`.
        """
        if num_ranks() == 1:
            return
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is not None and wrapper._join_config.enable:
            raise PatchError(
                "a Symphony model cannot train inside `Join` (accelerate's `join_uneven_inputs`): a rank that has run "
                "out of batches takes no part in the sum of the ranks' counts, and the others would wait for it. Give "
                "every rank the same number of batches: `drop_last=True`, or accelerate's `even_batches=True`"
            )

    def refuse_replica(self, stack: nn.Module) -> None:
        """Refuse a replica of DataParallel.

        Raises:
            PatchError: If the stack is one.
        """
        if getattr(stack, "_is_replica", False):
            raise PatchError(f"DataParallel trains replicas in threads, which {LOSES_COUNTS}")

    def before_commit(self, counters: Sequence[Stack], config: SymphonyConfig, state: TrainingState) -> None:
        """Check what the commit needs, and what training leaves unchanged although the settings say otherwise."""
        graphs = [graph for counter in counters for graph in counter.counted_graphs]
        self._widen(graphs)
        counted = tuple(map(id, graphs))
        if counted != self._checked:  # an adapter was added, or others are active
            if config.graph != "frozen":
                self._check_adapters(counters)
            if config.balance == "bias":
                self._refuse_biases_of_base(counters)
            self._checked = counted
        if self.num_commits % RANK_CHECK_EVERY == 0 and num_ranks() > 1:
            self._compare_ranks(graphs, counters[0].device)
        self.num_commits += 1
        if state.optimizer_parameters and not torch.compiler.is_compiling():
            names = {id(module): name for counter in counters for name, module in counter.owner.named_modules()}
            routers = [(names.get(id(router), "router"), router) for c in counters for router in c.routers]
            self.check_optimizers(state, routers, (p for counter in counters for p in counter.owner.parameters()))
        if config.weighs_losses:
            self._check_losses(counters, state.loss_recorded)

    def after_commit(self) -> None:
        """Warn about non-finite logits, where reading their number does not wait for a device."""
        if self.num_skipped is not None and self.num_skipped.device.type == "cpu":
            self.warn_about_skipped()

    def _widen(self, graphs: list[ExpertGraph]) -> None:
        cast = [graph for graph in graphs if graph.adjacency.dtype != torch.float32]
        for graph in cast:
            graph.widen()
        if cast:
            self.warn_once(
                f"{len(cast)} graphs were cast to another type than float32, in which an average stands still: they "
                "are float32 again. Cast the model with `.to` or `.half`, which leaves graphs as they are"
            )

    def _check_adapters(self, counters: Sequence[Stack]) -> None:
        """Warn about adapters trained without the graphs, which would be saved without them."""
        for counter in counters:
            if is_adapted(counter.owner):
                kept = kept_in_adapters(counter.owner)
                if not all(id(graph) in kept for graph in counter.counted_graphs):
                    self.warn_once(
                        "the model has adapters of PEFT, and its graphs are not in them: they are trained in the base "
                        "model, and are not saved with the adapter. Make the adapter's config with "
                        "`symphony_hf.lora_config`, or put modules_to_save=['symphony'] into it"
                    )

    def _refuse_biases_of_base(self, counters: Sequence[Stack]) -> None:
        """Refuse a correction bias that would move in the base model of an adapter, and not be saved with it.

        Raises:
            PatchError: If there is one.
        """
        for counter in (counter for counter in counters if is_adapted(counter.owner)):
            kept = kept_in_adapters(counter.owner)
            inside = [module for module in counter.owner.modules() if id(module) in kept]
            held = {id(t) for module in inside for t in (*module.buffers(False), *module.parameters(False))}
            for router, bias in zip(counter.routers, counter.placed.correction_biases(), strict=True):
                if id(bias) not in held:
                    remedy = adapter_remedy(router.contract, _name_of_holder(counter.owner, bias))
                    raise PatchError(
                        f"balance='bias': `{router.contract.correction_bias}` of {type(router).__name__} is not in "
                        "the adapter, which would be saved without what training moves: make the adapter's config "
                        f"with `symphony_hf.lora_config(model, {remedy})`, or symphonize with balance='loss'"
                    )

    def _compare_ranks(self, graphs: list[ExpertGraph], device: torch.device) -> None:
        """Warn if graphs differ between ranks. The all-reduce gives all ranks the same updates."""
        whole = [graph for graph in graphs if not graph.is_partitioned]
        number = num_differing(whole, device) if whole else 0
        if number:
            self.warn_once(
                f"{number} of {len(graphs)} graphs differ between the ranks: they were loaded or symphonized "
                "otherwise on one. Load the same checkpoint on every rank"
            )

    def check_optimizers(
        self, state: TrainingState, routers: list[tuple[str, Any]], parameters: Iterable[nn.Parameter]
    ) -> None:
        """Warn, once, about optimizers that were made before the routers' parameters, or without them."""
        missing, number = left_out(routers, parameters, state.optimizer_parameters or set())
        state.optimizer_parameters = None
        if missing:
            self.warn_once(
                f"the optimizer does not hold {len(missing)} of {number} router parameters ({missing[0]}, ...), "
                "which therefore stay as they are: make it after `symphonize`, or freeze them"
            )

    def _check_losses(self, counters: Sequence[Stack], loss_recorded: bool) -> None:
        if not any(is_trained(router) for counter in counters for router in counter.routers):
            self._check_frozen_routers([counter.owner for counter in counters])
        if not loss_recorded:
            self.warn_once(
                "this loop computes its own loss, so the balance and z-loss did not reach the routers. Pass the loss "
                "through `loss = symphony_hf.add_router_losses(model, loss)` before backward, train with "
                "`symphony_hf.with_router_losses(TrainerClass)`, or set `balance_loss_weight` and `z_loss_weight` to 0"
            )

    def _check_frozen_routers(self, stacks: list[nn.Module]) -> None:
        """Warn unless adapters are trained in the stacks: these freeze all base weights, routers too, by design."""
        if any(getattr(module, "disable_adapters", False) is True for stack in stacks for module in stack.modules()):
            return  # their parameters take no gradient while they are off, as in a reference's forward
        trains = any(map(is_trained, stacks))
        if not trains or not any(map(is_adapted, stacks)):
            effect = "train only what is below them" if trains else "have no effect, as all below them is frozen"
            self.warn_once(
                f"every router is frozen, so the balance and z-loss {effect}: train the routers (with PEFT: "
                "`lora_config(model, router='train')`), or set `balance_loss_weight` and `z_loss_weight` to 0"
            )

    def check_idle_routers(self, counters: Sequence[Stack], pending: Sequence[Observations]) -> None:
        """Warn about routers that a step went past. It reads from the device, so it is not called on a GPU."""
        bypassed = [
            block
            for counter, observed in zip(counters, pending, strict=True)
            for block in counter.placed.bypassed_blocks(observed.losses_L3[:, 2])
        ]
        if bypassed:
            self.warn_once(
                f"{len(bypassed)} of {sum(len(counter.routers) for counter in counters)} routers were not run in a "
                f"training step though their blocks ({type(bypassed[0]).__name__}) were: something reads their weight "
                "itself, past the graph, and they are not routed by it"
            )

    def note_skipped(self, skipped: Tensor) -> None:
        """Add to the number of times that logits were not finite: a scalar on its device, which is not read here."""
        kept = self.num_skipped
        self.num_skipped = skipped if kept is None else kept + skipped.to(kept.device)

    def warn_about_skipped(self) -> None:
        """Warn once that logits were not finite. It reads from the device, so on a GPU only a log calls it."""
        if self.num_skipped is not None and not torch.compiler.is_compiling() and int(self.num_skipped) > 0:
            self.warn_once(
                "router logits were not finite (NaN or infinite) in a training forward, which the graphs leave out. "
                "Look at the learning rate, the data, or the precision"
            )
