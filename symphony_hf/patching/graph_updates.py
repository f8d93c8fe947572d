"""Graph updates at each optimizer step. The tracker of a model also ties its router losses to the main loss."""

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

from .correction_bias import move_bias
from .counting import CoselectionCounter
from .expert_graph import is_functional
from .native_losses import NativeLosses
from .observations import Observations, backward_starts
from .training_checks import TrainingChecks, is_trained
from .training_state import TrainingState, keeps_loads, num_ranks, parameters_of

_TRACKERS: "weakref.WeakSet[Tracker]" = weakref.WeakSet()

_PATIENCE = 64
"""Calls to `update_graphs` without an optimizer step before the user is warned."""


def _note_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note a step of any torch optimizer, including those inside DeepSpeed and accelerate: a global hook."""
    held = parameters_of(optimizer)
    trackers = list(_TRACKERS)
    owners = {tracker for tracker in trackers if held & tracker.parameter_ids()}
    for tracker in owners:
        tracker.warn_if_bypassed()
    for tracker in trackers:
        tracker.state.note_step(optimizer, held, tracker in owners, is_foreign=bool(owners - {tracker}))


@functools.cache
def _watch_optimizers() -> None:
    """Register the hook, once, when the first model is symphonized."""
    register_optimizer_step_post_hook(_note_optimizer_step)


class Tracker:
    """Follows the training of one Symphony model.

    Attributes:
        state: State kept between forwards.
        checks: Checks for failures that would otherwise be silent.
        counters: One for each decoder stack and number of experts.
        handles: Hooks to remove when the model is restored.
        native_losses: What switches the model's own router losses off.
        log_probs_hook: The hook for TRL's SFTTrainer, while one is training.
    """

    def __init__(self) -> None:
        self.state = TrainingState()
        self.checks = TrainingChecks()
        self.counters: list[CoselectionCounter] = []
        self.handles: list[Any] = []
        self.native_losses: list[NativeLosses] = []
        self.log_probs_hook: Any = None
        _watch_optimizers()
        _TRACKERS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register copies, so that their optimizer steps are seen."""
        self.__dict__.update(state)
        _watch_optimizers()
        _TRACKERS.add(self)

    @property
    def config(self) -> SymphonyConfig:
        """The settings, the same in every router."""
        return self.counters[0].config

    @property
    def device(self) -> torch.device:
        return self.counters[0].device

    @property
    def in_training_forward(self) -> bool:
        """Whether the forward under way, or the last one, is a training forward."""
        return any(counter.active for counter in self.counters)

    def parameter_ids(self) -> set[int]:
        """Return the identities of the decoder stacks' parameters."""
        return {id(parameter) for counter in self.counters for parameter in counter.owner.parameters()}

    def correction_biases(self) -> list[Tensor]:
        """Return the correction bias of each router, which `balance="bias"` moves beside the graphs."""
        return [bias for counter in self.counters for bias in counter.placed.correction_biases()]

    def is_trained(self) -> bool:
        """Whether a parameter of the decoder stacks is trained."""
        return any(is_trained(counter.owner) for counter in self.counters)

    def place_scale(self) -> None:
        """Put the scale on the graphs' device before a forward refers to it.

        Called as soon as the device is known: a tensor that torch.compile sees made inside its graph cannot be
        written in backward.
        """
        device, state = self.device, self.state
        if device.type != "meta" and (state.scale is None or state.scale.device != device):
            state.scale = torch.zeros((), device=device, dtype=torch.float32)

    def record_loss(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Tie the router losses to a main loss: whatever scales its gradient scales theirs.

        Args:
            loss: The loss that the loop calls backward on, perhaps scaled, or the values that it averages.
            share: This micro-batch's share of the optimizer step, where `loss` is already multiplied by it; a factor
                for each element where `loss` has several.

        Returns:
            The same loss.
        """
        state = self.state
        if state.scale is None or not loss.requires_grad or is_functional():
            return loss
        state.recorded_in_forward = True
        share = torch.as_tensor(share, dtype=torch.float32, device=loss.device)
        loss = RecordGradientScale.apply(loss, share, state.scale)
        if torch.compiler.is_compiling():
            state.loss_recorded = True  # a hook that notes it would break the graph
        else:
            loss.register_hook(self._note_backward)
        return loss

    def _note_backward(self, gradient: Tensor) -> None:
        self.state.loss_recorded = True

    def remove_log_probs_hook(self) -> None:
        """Remove the hook that SymphonyCallback added for TRL's SFTTrainer, if there is one."""
        if self.log_probs_hook is not None:
            self.log_probs_hook.remove()
        self.log_probs_hook = None

    def settle(self) -> None:
        """Commit the last optimizer step if the loop did not. Called before a training forward."""
        if not self.state.stepped or is_functional():
            return
        self.commit()
        if not torch.compiler.is_compiling():
            self.checks.warn_once(
                "nothing moved the graphs after an optimizer step, so they move at the next forward, and on several "
                "ranks the last step of a run is left out. Call `symphony_hf.update_graphs(model)` after "
                "`optimizer.step()`, or give Trainer `callbacks=[symphony_hf.SymphonyCallback()]`"
            )

    def warn_if_bypassed(self) -> None:
        """Warn about a training loop that runs routers outside of their stack's forward, where nothing counts them."""
        owner, self.state.ran_outside = self.state.ran_outside, None
        if owner is not None:
            self.checks.warn_once(
                f"routers of {owner} ran outside of its forward, so they were not counted and had no router losses: in "
                f"training, call the model, or its {owner}, itself, and not its `forward`, another method or its layers"
            )

    def take_part(self, output: Any) -> None:
        """Let each of several ranks count a training forward once its backward begins, also if it ran no router.

        A batch of text alone leaves out an image encoder that another rank runs, and the ranks commit together.
        """
        if num_ranks() == 1 or is_functional():
            return
        starts = [] if torch.compiler.is_compiling() else backward_starts(output)
        for tensor in starts:
            tensor.register_hook(self._take_part)
        if not starts:
            self._take_part()

    def _take_part(self, gradient: Tensor | None = None) -> None:
        self.state.counted.update(self.state.routers)

    def settle_alone(self) -> None:
        """Commit the last optimizer step if the loop did not. Called before the graphs are read, as by a save."""
        if not torch.compiler.is_compiling():
            for losses in self.native_losses:
                losses.put_back()  # what a KeyboardInterrupt in a forward left switched off
        self.commit_alone()

    def commit_alone(self) -> None:
        """Commit the last optimizer step if the loop did not, on this rank alone.

        Several ranks must commit together, and a save or an evaluation may be of one of them, so they are warned.
        """
        # `stepped` last: a compiled forward that had read it would be compiled again when it changes.
        if torch.compiler.is_compiling() or is_functional() or not self.state.stepped:
            return
        if num_ranks() == 1:
            with torch.inference_mode(False):
                self.commit()
            return
        self.checks.warn_once(
            "the graphs are read, and the last optimizer step has not moved them yet: call "
            "`symphony_hf.update_graphs(model)` on every rank after `optimizer.step()`"
        )

    @torch.no_grad()
    def commit(self) -> bool:
        """Update every graph with the pending counts: one all-reduce, one step of the moving average.

        Where an optimizer of this model is known and has not stepped, everything stays pending: a call at each
        micro-batch moves the graphs once per optimizer step. None is known before its first step, and each call
        moves them.

        Returns:
            Whether the graphs moved.
        """
        state = self.state
        self.warn_if_bypassed()
        if not state.counted or self._is_early():
            return False
        # On several ranks every stack: one that no image came by here may have been run on another.
        counters = [counter for counter in self.counters if num_ranks() > 1 or counter.key in state.counted]
        # Read before anything moves: one that cannot be moved is refused.
        is_biased = self.config.balance == "bias"
        biases = [counter.placed.correction_biases() if is_biased else [] for counter in counters]
        pending = [state.gather(counter.key, counter.num_experts, counter.device) for counter in counters]
        self.checks.before_commit(self.counters, self.config, state)
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            self.checks.check_idle_routers(counters, pending)
        if state.loss_recorded or not self.config.weighs_losses:
            self._log_losses(counters, pending)
        summed = self._sum_over_ranks(pending)
        for counter, biases_L, (counts_LEE, tokens_L, skipped_L) in zip(counters, biases, summed, strict=True):
            if self.config.counts_selections:
                self.checks.note_skipped(skipped_L.sum())
            self._move(counter, counts_LEE, tokens_L)
            if keeps_loads(counter.config):
                counter.keep_loads(counts_LEE, tokens_L)
            if is_biased:
                for bias, counts_EE in zip(biases_L, counts_LEE, strict=True):
                    move_bias(bias, counts_EE.diagonal(), self.config.bias_rate)
        state.finish_commit()
        self.checks.after_commit()
        return True

    def _is_early(self) -> bool:
        state = self.state
        if torch.compiler.is_compiling() or not state.awaits_step():
            return False
        state.commits_without_step += 1
        if state.commits_without_step == _PATIENCE:
            self.checks.warn_once(
                f"`update_graphs` was called {_PATIENCE} times, and the optimizer that holds this model's parameters "
                "took no step, so the graphs stay as they are. If another optimizer trains it now, delete the old one"
            )
        return True

    def _log_losses(self, counters: list[CoselectionCounter], pending: list[Observations]) -> None:
        observed = {counter.key: losses.losses_L3 for counter, losses in zip(counters, pending, strict=True)}
        device = self.device
        self.state.log_losses(
            [
                observed[counter.key].to(device)
                if counter.key in observed
                else torch.zeros(len(counter.routers), 3, device=device)
                for counter in self.counters
            ]
        )

    def _sum_over_ranks(self, pending: list[Observations]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Sum counts, tokens and skipped forwards of each stack over the ranks, in one all-reduce."""
        summed = ((observed.counts_LEE, observed.tokens_L, observed.skipped_L) for observed in pending)
        parts = [tensor for tensors in summed for tensor in tensors]
        if num_ranks() > 1:
            # Ranks that saw the same tokens (tensor parallel) multiply counts and tokens alike, which cancels.
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat)
            split = flat.split([part.numel() for part in parts])
            parts = [total.reshape(part.shape) for total, part in zip(split, parts, strict=True)]
        return list(zip(parts[::3], parts[1::3], parts[2::3], strict=True))

    def _move(self, counter: CoselectionCounter, counts_LEE: Tensor, tokens_L: Tensor) -> None:
        for graph, counts_EE, num_tokens in zip(counter.counted_graphs, counts_LEE, tokens_L, strict=True):
            if graph.config.graph == "learned":
                graph.adjacency.copy_(graph.symmetrized())
            if not graph.config.counts_selections:
                graph.updates.add_(1)
                continue
            counts_EE, num_tokens = counts_EE.to(graph.adjacency.device), num_tokens.to(graph.adjacency.device)
            graph.adjacency.copy_(update_adjacency(graph.adjacency, counts_EE, num_tokens, graph.config.decay))
            graph.updates.add_((num_tokens > 0).to(graph.updates.dtype))
