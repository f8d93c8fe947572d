"""What is looked at while training, since it goes wrong in silence: optimizers, adapters, losses, the ranks' graphs."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import SymphonyWarning

from .counting import RouterStack, num_ranks
from .expert_graph import ExpertGraph, is_adapted, kept_in_adapters

RANK_CHECK_EVERY = 100
"""Commits between two looks at whether all ranks have the same graphs."""

CROWDED_STEPS = 3
"""Optimizer steps in a row with several commits each that are no accident; a loss scaler skips a step now and then."""

_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""An odd number without pattern, as an int64: what is multiplied by it can be told apart afterwards."""


def left_out(
    routers: Iterable[tuple[str, nn.Module]], parameters: Iterable[nn.Parameter], held: set[int]
) -> tuple[list[str], int]:
    """The router parameters that should be trained and that no optimizer holds.

    Args:
        routers: With their names.
        parameters: Of the model around them.
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
    """A hash of a graph's bits, each at its place, and of how many updates it has seen.

    Returns:
        An int64 scalar. Products and sums wrap around in it.
    """
    bits = graph.adjacency.detach().contiguous().view(torch.int32).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _MULTIPLIER
    mixed = (bits + 1) * (places | 1)
    return (mixed ^ (mixed >> 29)).sum() + graph.updates.to(bits.device) * _MULTIPLIER


def num_differing(graphs: Sequence[ExpertGraph], device: torch.device) -> int:
    """How many graphs are not the same on all ranks. One all-reduce, which every rank must take part in."""
    own = torch.stack([fingerprint(graph).cpu() for graph in graphs])
    extremes = torch.cat([own, ~own]).to(device)  # `~` turns the order around, and cannot overflow
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(own)], ~extremes[len(own) :]
    return int((highest != lowest).sum())


class Guards:
    """What is said, once, of a training in which something goes wrong in silence: one per model.

    Args:
        stacks: Of the model's routers; the list is the tracker's own.

    Attributes:
        held: The identities of what optimizers hold that have taken steps; None once they were looked at.
        evaluated: Whether a forward with gradient was not counted, as it ran in evaluation mode, since the last commit.
        stepped_uncounted: Whether an optimizer has taken a step after such a forward, with nothing to commit.
        commits_since_step: Commits since an optimizer's last step: one, where all is well.
        num_skipped: Updates that met non-finite logits, on the graphs' device; None before the first update.
    """

    def __init__(self, stacks: list[RouterStack]) -> None:
        self.stacks = stacks
        self.held: set[int] | None = set()
        self.evaluated = False
        self.stepped_uncounted = False
        self.commits_since_step = 0
        self.crowded_steps = 0
        self.num_commits = 0
        self.num_skipped: Tensor | None = None
        self._warned: set[str] = set()

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, SymphonyWarning, stacklevel=3)

    def note_optimizer_step(self, optimizer: torch.optim.Optimizer, has_pending: bool, stepped: bool) -> None:
        """An optimizer, perhaps of this model, took a step.

        Args:
            optimizer: It.
            has_pending: Whether there is something to commit.
            stepped: Whether an optimizer has taken a step since there is.
        """
        self.stepped_uncounted = self.stepped_uncounted or (self.evaluated and not has_pending)
        if stepped and self.held is not None:
            self.held.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if self.commits_since_step > 0:
            self.crowded_steps = self.crowded_steps + 1 if self.commits_since_step > 1 else 0
        if self.crowded_steps == CROWDED_STEPS:
            self.warn_once(
                f"the graphs moved {self.commits_since_step} times within one optimizer step, each time by a "
                "micro-batch: call `update_graphs` once, after `optimizer.step()`, so that their average does not "
                "depend on gradient accumulation"
            )
        self.commits_since_step = 0

    def before_commit(self, config: SymphonyConfig, graphs: list[ExpertGraph], loss_recorded: bool) -> None:
        """Look at what the commit needs, and at what training leaves as it is though the settings want it otherwise.

        Args:
            config: The same in every router.
            graphs: All of them.
            loss_recorded: Whether a main loss whose gradient starts the routers' went backward.
        """
        self._widen(graphs)
        if self.num_commits == 0 and config.graph != "frozen":
            self._look_at_adapters()
        if self.num_commits % RANK_CHECK_EVERY == 0 and num_ranks() > 1:
            self._compare_ranks(graphs)
        self.num_commits += 1
        if self.held and not torch.compiler.is_compiling():
            self._look_at_optimizers_that_stepped()
        if config.weighs_losses:
            self._look_at_losses(loss_recorded)

    def after_commit(self) -> None:
        self.evaluated = self.stepped_uncounted = False
        self.commits_since_step += 1
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

    def _look_at_adapters(self) -> None:
        """An adapter that is trained without the graphs is saved without them."""
        for stack in self.stacks:
            if is_adapted(stack.owner):
                kept = kept_in_adapters(stack.owner)
                if not all(id(graph) in kept for graph in stack.graphs):
                    self.warn_once(
                        "the model has adapters of PEFT, and its graphs are not in them: they are trained in the base "
                        "model, and are not saved with the adapter. Make the adapter's config with "
                        "`symphony_hf.lora_config`, or put modules_to_save=['symphony'] into it"
                    )

    def _compare_ranks(self, graphs: list[ExpertGraph]) -> None:
        """All ranks must have the same graphs. What they add to them is the same by the all-reduce."""
        number = num_differing(graphs, self.stacks[0].device)
        if number:
            self.warn_once(
                f"{number} of {len(graphs)} graphs differ between the ranks: they were loaded or symphonized "
                "otherwise on one. Load the same checkpoint on every rank"
            )

    def look_at_optimizers(self, routers: list[tuple[str, Any]], parameters: Iterable[nn.Parameter]) -> None:
        """Notice, once, optimizers that were made before the routers' parameters, or without them.

        Args:
            routers: With their names.
            parameters: Of the model.
        """
        missing, number = left_out(routers, parameters, self.held or set())
        self.held = None
        if missing:
            self.warn_once(
                f"the optimizer does not hold {len(missing)} of {number} router parameters ({missing[0]}, ...), "
                "which therefore stay as they are: make it after `symphonize`, or freeze them"
            )

    def _look_at_optimizers_that_stepped(self) -> None:
        """At the first commit after one has: where no Trainer showed its own before."""
        names = {id(module): name for stack in self.stacks for name, module in stack.owner.named_modules()}
        routers = [(names.get(id(router), "router"), router) for stack in self.stacks for router in stack.routers]
        self.look_at_optimizers(routers, (p for stack in self.stacks for p in stack.owner.parameters()))

    def _look_at_losses(self, loss_recorded: bool) -> None:
        routers = [router for stack in self.stacks for router in stack.routers]
        if not any(parameter.requires_grad for router in routers for parameter in router.parameters()):
            self.warn_once(
                "every router is frozen, so the balance and z-loss train only what is below them: train the routers "
                "(with PEFT: `lora_config(model, router='train')`), or set `balance_loss_weight` and `z_loss_weight` "
                "to 0"
            )
        if not loss_recorded:
            self.warn_once(
                "this loop computes its own loss, so the balance and z-loss did not reach the routers. Pass the loss "
                "through `loss = symphony_hf.add_router_losses(model, loss)` before backward, or set "
                "`balance_loss_weight` and `z_loss_weight` to 0"
            )

    def look_at_idle_routers(self, stacks: list[RouterStack]) -> None:
        """Of the step that is committed. It reads from the device, so it is not called on a GPU."""
        bypassed = [block for stack in stacks for block in stack.bypassed_blocks()]
        if bypassed:
            self.warn_once(
                f"{len(bypassed)} of {sum(len(stack.routers) for stack in self.stacks)} routers were not run in a "
                f"training step though their blocks ({type(bypassed[0]).__name__}) were: something reads their weight "
                "itself, past the graph, and they are not routed by it"
            )

    def note_skipped(self, skipped: Tensor) -> None:
        """Whether a graph's update met non-finite logits, an integer on its device, which is not read here."""
        kept = self.num_skipped
        self.num_skipped = skipped if kept is None else kept + skipped.to(kept.device)

    def warn_about_skipped(self) -> None:
        """Say once that updates met non-finite logits. It reads from the device, so on a GPU only a log asks for it."""
        if self.num_skipped is not None and not torch.compiler.is_compiling() and int(self.num_skipped) > 0:
            self.warn_once(
                "router logits were not finite (NaN or infinite) in training: the graphs stay as they were before "
                "such a step. Look at the learning rate, the data, or the precision"
            )
