"""What training a Symphony model keeps between forwards: counts and losses until the graph moves, at commit."""

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import SymphonyConfig
from .errors import SymphonyWarning
from .graph import ExpertGraph, active_graph, is_adapted, kept_in_adapters
from .guards import left_out, num_differing
from .routing import RecordGradientScale, update_adjacency
from .stack import RouterStack, num_ranks

RANK_CHECK_EVERY = 100
"""Commits between two looks at whether all ranks have the same graphs."""

CROWDED_STEPS = 3
"""Optimizer steps in a row with several commits each that are no accident; a loss scaler skips a step now and then."""

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
        driven: True while a callback (or the user's loop) calls `commit` at each optimizer step. Where nothing
            does, the first training forward after the step commits.
        stepped: Whether an optimizer has taken a step since there is something to commit.
        evaluated: Whether a forward with gradient was not counted, as it ran in evaluation mode, since the last commit.
        stepped_uncounted: Whether an optimizer has taken a step after such a forward, with nothing to commit.
        commits_since_step: Commits since an optimizer's last step: one, where all is well.
        held: The identities of what optimizers hold that have taken steps; None once they were looked at.
        scale: The factor that the main loss's gradient came with, written in the backward pass.
        awaits_backward: Whether a main loss was recorded whose backward has not begun.
    """

    def __init__(self) -> None:
        self.stacks: list[RouterStack] = []
        self.driven = False
        self.stepped = False
        self.evaluated = False
        self.stepped_uncounted = False
        self.commits_since_step = 0
        self.crowded_steps = 0
        self.held: set[int] | None = set()
        _watch_optimizers()
        _TRACKERS.add(self)
        self.scale: Tensor | None = None
        self.loss_recorded = False
        self.recorded_in_forward = False
        self.awaits_backward = False
        self.outer_mask: Any = None  # what the model itself was given, in the forward under way
        self.num_skipped: Tensor | None = None
        # (1 + num_routers, 3): balance and z summed over forwards, and their number: of their mean, and of each router.
        self.logged_losses: Tensor | None = None
        # What the patching must undo.
        self.handles: list[Any] = []
        self.silenced: list[tuple[Any, str, float]] = []
        self.own_loss: Any = None
        self.log_probs_hook: Any = None
        self.num_commits = 0
        self._warned: set[str] = set()

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

    @property
    def weighs_losses(self) -> bool:
        config = self.config
        return config.balance_loss_weight > 0 or config.z_loss_weight > 0

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
        self.stepped_uncounted = self.stepped_uncounted or (self.evaluated and not has_pending)
        if self.stepped and self.held is not None:
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

    def commit_if_forgotten(self) -> None:
        """Before a training forward: settle the last optimizer step where nothing did when it was taken."""
        if self.awaits_backward or not self.stepped:
            return
        self.driven = False  # what drove has stopped: a loop that came to its end, or to an exception
        self.commit()
        if not torch.compiler.is_compiling():
            self.warn_once(
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
        self._look_at_routers()
        self._warn_when_losses_are_off()
        self._note_losses(stacks)
        for stack, counts_LEE in zip(stacks, self._sum_over_ranks(stacks), strict=True):
            self._move(stack, counts_LEE)
        for stack in stacks:
            assert stack.tensors is not None
            stack.tensors.pending_counts.zero_()
            stack.tensors.pending_losses.zero_()
            stack.has_pending = False
        self.awaits_backward = self.stepped = self.evaluated = self.stepped_uncounted = False
        self.commits_since_step += 1
        if self.scale is not None and not torch.compiler.is_compiling():
            self.scale.zero_()  # a loss that is not recorded must not start the routers' with an old factor
        if self.num_skipped is not None and self.num_skipped.device.type == "cpu":
            self.warn_about_skipped()
        return True

    def _look_at_routers(self) -> None:
        """Notice, once, what training leaves as it is though the settings want it otherwise."""
        graphs = [graph for graph in self.graphs if graph.adjacency.dtype != torch.float32]
        if graphs:
            for graph in graphs:
                graph.widen()
            self.warn_once(
                f"{len(graphs)} graphs were cast to another type than float32, in which an average stands still: they "
                "are float32 again. Cast the model with `.to` or `.half`, which leaves graphs as they are"
            )
        if self.num_commits == 0:
            self._look_for_adapters()
        if self.num_commits % RANK_CHECK_EVERY == 0 and num_ranks() > 1:
            self._compare_ranks()
        self.num_commits += 1
        if self.held and not torch.compiler.is_compiling():
            self._look_at_optimizers_that_stepped()
        routers = [router for stack in self.stacks for router in stack.routers]
        if self.weighs_losses and not any(p.requires_grad for r in routers for p in r.parameters()):
            self.warn_once(
                "every router is frozen, so the balance and z-loss train only what is below them: train the routers "
                "(with PEFT: `lora_config(model, router='train')`), or set `balance_loss_weight` and `z_loss_weight` "
                "to 0"
            )

    def _look_for_adapters(self) -> None:
        """An adapter that is trained without the graphs is saved without them."""
        for stack in self.stacks:
            if self.config.graph != "frozen" and is_adapted(stack.owner):
                kept = kept_in_adapters(stack.owner)
                if not all(id(graph) in kept for graph in stack.graphs):
                    self.warn_once(
                        "the model has adapters of PEFT, and its graphs are not in them: they are trained in the base "
                        "model, and are not saved with the adapter. Make the adapter's config with "
                        "`symphony_hf.lora_config`, or put modules_to_save=['symphony'] into it"
                    )

    def _compare_ranks(self) -> None:
        """All ranks must have the same graphs. What they add to them is the same by the all-reduce."""
        number = num_differing(self.graphs, self.stacks[0].device)
        if number:
            self.warn_once(
                f"{number} of {len(self.graphs)} graphs differ between the ranks: they were loaded or symphonized "
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
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self._warn_about_idle_routers(stacks)
        self.logged_losses = noted if self.logged_losses is None else self.logged_losses + noted

    def _warn_about_idle_routers(self, stacks: list[RouterStack]) -> None:
        bypassed = [block for stack in stacks for block in stack.bypassed_blocks()]
        if bypassed:
            self.warn_once(
                f"{len(bypassed)} of {self.num_routers} routers were not run in a training step though their blocks "
                f"({type(bypassed[0]).__name__}) were: something reads their weight itself, past the graph, and they "
                "are not routed by it"
            )

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
            skipped = (~torch.isfinite(num_tokens)).to(torch.int32)
            self.num_skipped = (
                skipped if self.num_skipped is None else self.num_skipped + skipped.to(self.num_skipped.device)
            )

    def warn_about_skipped(self) -> None:
        """Say once that updates met non-finite logits. It reads from the device, so on a GPU only a log asks for it."""
        if self.num_skipped is not None and not torch.compiler.is_compiling() and int(self.num_skipped) > 0:
            self.warn_once(
                "router logits were not finite (NaN or infinite) in training: the graphs stay as they were before "
                "such a step. Look at the learning rate, the data, or the precision"
            )

    def _warn_when_losses_are_off(self) -> None:
        if not self.loss_recorded and self.weighs_losses:
            self.warn_once(
                "this loop computes its own loss, so the balance and z-loss did not reach the routers. Pass the loss "
                "through `loss = symphony_hf.add_router_losses(model, loss)` before backward, or set "
                "`balance_loss_weight` and `z_loss_weight` to 0"
            )
        self.loss_recorded = False

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

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, SymphonyWarning, stacklevel=3)
