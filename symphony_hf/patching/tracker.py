"""What training a Symphony model keeps between forwards: counts and losses until the graph moves, at commit."""

import functools
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from symphony_hf.config import SymphonyConfig
from symphony_hf.routing.graph import update_adjacency
from symphony_hf.routing.losses import RecordGradientScale

from .counting import RouterStack, num_ranks
from .expert_graph import ExpertGraph, active_graph
from .training_checks import Guards

_TRACKERS: "weakref.WeakSet[Tracker]" = weakref.WeakSet()


def _note_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of any optimizer of torch, those inside DeepSpeed's and accelerate's too."""
    for tracker in _TRACKERS:
        tracker.note_optimizer_step(optimizer)


@functools.cache
def _watch_optimizers() -> None:
    """Once, when the first model is symphonized."""
    register_optimizer_step_post_hook(_note_optimizer_step)


class Tracker:
    """Everything that training a Symphony model keeps between forwards: one per model.

    Attributes:
        guards: What is said of a training that goes wrong.
        driven: True while a callback (or the user's loop) calls `commit` at each optimizer step. Where nothing
            does, the first training forward after the step commits.
        stepped: Whether an optimizer has taken a step since there is something to commit.
        scale: The factor that the main loss's gradient came with, written in the backward pass.
        awaits_backward: Whether a main loss was recorded whose backward has not begun.
    """

    def __init__(self) -> None:
        self.stacks: list[RouterStack] = []
        self.guards = Guards(self.stacks)
        self.driven = False
        self.stepped = False
        self.scale: Tensor | None = None
        self.loss_recorded = False
        self.recorded_in_forward = False
        self.awaits_backward = False
        self.outer_mask: Any = None  # what the model itself was given, in the forward under way
        # (1 + num_routers, 3): balance and z summed over forwards, and their number: of their mean, and of each router.
        self.logged_losses: Tensor | None = None
        # What the patching must undo.
        self.handles: list[Any] = []
        self.silenced: list[tuple[Any, str, float]] = []
        self.own_loss: Any = None
        self.log_probs_hook: Any = None
        _watch_optimizers()
        _TRACKERS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy's, too, the optimizer's steps are noted."""
        self.__dict__.update(state)
        _watch_optimizers()
        _TRACKERS.add(self)

    @property
    def graphs(self) -> list[ExpertGraph]:
        return [graph for stack in self.stacks for graph in stack.graphs]

    @property
    def num_routers(self) -> int:
        return sum(len(stack.routers) for stack in self.stacks)

    @property
    def config(self) -> SymphonyConfig:
        """The same in every router."""
        return active_graph(self.stacks[0].routers[0].symphony).config  # type: ignore[arg-type]

    def place_scale(self) -> None:
        """Have `scale` on the graphs' device before a forward refers to it.

        Called as soon as the device is known: a tensor that torch.compile sees made inside its graph cannot be
        written in backward.
        """
        device = self.stacks[0].device
        if device.type != "meta" and (self.scale is None or self.scale.device != device):
            self.scale = torch.zeros((), device=device, dtype=torch.float32)

    def record_loss(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Tie the router losses to a main loss: whatever scales its gradient scales theirs.

        Args:
            loss: What the loop will call backward on, perhaps scaled; or what it makes the mean of.
            share: The part that this micro-batch is of the optimizer step, where `loss` already has it divided in; a
                factor for each element where `loss` has several.

        Returns:
            The same loss.
        """
        if self.scale is None or not loss.requires_grad:
            return loss
        self.recorded_in_forward = True
        share = torch.as_tensor(share, dtype=torch.float32, device=loss.device)
        loss = RecordGradientScale.apply(loss, share, self.scale)
        if torch.compiler.is_compiling():
            self.loss_recorded = True  # a hook that notes it would break the graph
        else:
            self.awaits_backward = True
            loss.register_hook(self._note_backward)
        return loss

    def _note_backward(self, gradient: Tensor) -> None:
        self.awaits_backward, self.loss_recorded = False, True

    def remove_log_probs_hook(self) -> None:
        """Take away what a Trainer of TRL was given for its own loss, if it was."""
        if self.log_probs_hook is not None:
            self.log_probs_hook.remove()
        self.log_probs_hook = None

    def note_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer, perhaps of this model, took a step."""
        has_pending = any(stack.has_pending for stack in self.stacks)
        self.stepped = self.stepped or has_pending
        self.guards.note_optimizer_step(optimizer, has_pending, self.stepped)

    def commit_if_forgotten(self) -> None:
        """Before a training forward: settle the last optimizer step where nothing did when it was taken."""
        if self.awaits_backward or not self.stepped:
            return
        self.driven = False  # what drove has stopped: a loop that came to its end, or to an exception
        self.commit()
        if not torch.compiler.is_compiling():
            self.guards.warn_once(
                "nothing moved the graphs after an optimizer step, so they move at the next training forward, and the "
                "last step of a run is left out. Call `symphony_hf.update_graphs(model)` after `optimizer.step()`, or "
                "give Trainer `callbacks=[symphony_hf.SymphonyCallback()]`"
            )

    @torch.no_grad()
    def commit(self) -> bool:
        """Move every graph by what was counted since the last commit: one all-reduce, one step of the average.

        Returns:
            Whether there was anything to commit.
        """
        if not any(stack.has_pending for stack in self.stacks):
            return False
        # On several ranks every stack: one that no image came by here may have been run on another.
        stacks = [stack for stack in self.stacks if stack.has_pending or num_ranks() > 1]
        for stack in stacks:
            stack.place_tensors()
        self.guards.before_commit(self.config, self.graphs, self.loss_recorded)
        self.loss_recorded = False
        if self.stacks[0].device.type == "cpu" and not torch.compiler.is_compiling():
            self.guards.look_at_idle_routers(stacks)
        self._note_losses(stacks)
        for stack, counts_LEE in zip(stacks, self._sum_over_ranks(stacks), strict=True):
            self._move(stack, counts_LEE)
        for stack in stacks:
            assert stack.tensors is not None
            stack.tensors.pending_counts.zero_()
            stack.tensors.pending_losses.zero_()
            stack.has_pending = False
        self.awaits_backward = self.stepped = False
        if self.scale is not None and not torch.compiler.is_compiling():
            self.scale.zero_()  # a loss that is not recorded must not start the routers' with an old factor
        self.guards.after_commit()
        return True

    def _note_losses(self, stacks: list[RouterStack]) -> None:
        device = self.stacks[0].device
        pending = [
            torch.zeros(len(stack.routers), 3, device=device)
            if stack.tensors is None  # it never ran
            else stack.tensors.pending_losses.to(device)
            for stack in self.stacks
        ]
        of_routers = torch.cat(pending)
        sums = torch.stack([losses.sum(0) for losses in pending]).sum(0) / self.num_routers
        mean = torch.cat([sums[:2], of_routers[:, 2].max().reshape(1)])
        noted = torch.cat([mean.unsqueeze(0), of_routers])
        self.logged_losses = noted if self.logged_losses is None else self.logged_losses + noted

    def _sum_over_ranks(self, stacks: list[RouterStack]) -> list[Tensor]:
        counts = [stack.tensors.pending_counts for stack in stacks if stack.tensors is not None]
        if num_ranks() == 1:
            return counts
        # Ranks that saw the same tokens (tensor parallel) multiply counts and tokens alike, which cancels.
        flat = torch.cat([c.reshape(-1) for c in counts])
        dist.all_reduce(flat)
        return [part.reshape(c.shape) for part, c in zip(flat.split([c.numel() for c in counts]), counts, strict=True)]

    def _move(self, stack: RouterStack, counts_LEE: Tensor) -> None:
        for graph, counts_EE in zip(stack.graphs, counts_LEE, strict=True):
            if graph.config.graph == "learned":
                graph.adjacency.copy_(graph.social_graph())
            if not graph.config.counts_selections:
                graph.updates.add_(1)
                continue
            counts_EE = counts_EE.to(graph.adjacency.device)
            # Every token chose K experts, so the loads on the diagonal add up to K times the tokens.
            num_tokens = counts_EE.diagonal().sum() / graph.top_k
            graph.adjacency.copy_(update_adjacency(graph.adjacency, counts_EE, num_tokens, graph.config.decay))
            graph.updates.add_((torch.isfinite(num_tokens) & (num_tokens > 0)).to(graph.updates.dtype))
            self.guards.note_skipped((~torch.isfinite(num_tokens)).to(torch.int32))

    def take_losses(self) -> dict[str, float]:
        """Mean balance and z-loss over layers, of each over its forwards since the last call; empty without any.

        A layer that did not run, as one for images in steps of text alone, is left out.
        """
        if self.logged_losses is None:
            return {}
        mean, *of_routers = self.logged_losses.tolist()
        self.logged_losses = None
        ran = [losses for losses in of_routers if losses[2] > 0]
        if not ran:
            return {}
        if all(losses[2] == mean[2] for losses in of_routers):
            return {"balance_loss": mean[0] / mean[2], "z_loss": mean[1] / mean[2]}
        means = [(balance / count, z / count) for balance, z, count in ran]
        balance, z = (sum(values) / len(ran) for values in zip(*means, strict=True))
        return {"balance_loss": balance, "z_loss": z}
