"""State that a Symphony model keeps between two forwards while it trains.

README.md states the counting rule that this file carries out.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_hf.config import SymphonyConfig

from .observations import ForwardRecord, Observations
from .padding import GivenMasks


class TrainingState:
    """Everything that outlives a forward while a Symphony model trains. Each model has one.

    Attributes:
        routers: The routers of each stack, by the stack's key, as of its last training forward.
        pending: Observations that count and wait for a commit, by the stack's key.
        counted: Keys of the stacks that take part in the next commit. Other stacks' tensors are zeroed, not removed:
            compiled forwards write into the same ones.
        stepped: Whether an optimizer has stepped since there is something pending.
        scale: The factor that the main loss's gradient arrived with, written in the backward pass. A scalar.
        loss_recorded: Whether a main loss that starts the routers' went backward since the last commit.
        recorded_in_forward: Whether the forward under way has recorded its loss.
        masks: The masks that the model, and those inside it, were given in the forwards under way.
        ran_outside: Name of a stack whose routers were trained outside of its forward, and so were not counted; None if
            there is none, or a warning has named it.
        has_begun: Whether training has begun: an optimizer took a step that counts, or a trainer's callback said so.
        evaluated: Whether a forward with gradient ran in evaluation mode since the last commit.
        stepped_uncounted: Whether an optimizer stepped after a forward in evaluation mode while nothing was pending.
        optimizer_parameters: Identities of the parameters that optimizers which stepped hold; None once they were
            checked.
        last_loads: Each expert's share of the tokens of the last committed step, of all ranks, by the stack's key; even
            where there was none. Shape of each: (L, num_experts). Kept where `balance_scope` is `last_step`.
        logged_losses: Sums since the last log of the balance loss, the z-loss and the number of forwards. Row 0 is the
            mean over routers, then one row for each. Shape: (1 + number of routers, 3).
    """

    def __init__(self) -> None:
        self.routers: dict[int, list[nn.Module]] = {}
        self.pending: dict[int, Observations] = {}
        self.counted: set[int] = set()
        self.stepped = False
        self.scale: Tensor | None = None
        self.loss_recorded = False
        self.recorded_in_forward = False
        self.masks = GivenMasks()
        self.ran_outside: str | None = None
        self.has_begun = False
        self.evaluated = False
        self.stepped_uncounted = False
        self.optimizer_parameters: set[int] | None = set()
        self.last_loads: dict[int, Tensor] = {}
        self.logged_losses: Tensor | None = None
        self.commits_without_step = 0
        self._generation = 0
        self._in_backward = False
        self._own_optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._compiled_records: dict[int, ForwardRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the optimizer: a copy of the model has its own, and weak references cannot be pickled."""
        return {**self.__dict__, "_own_optimizer": None, "_in_backward": False, "has_begun": False}

    @property
    def num_routers(self) -> int:
        return sum(map(len, self.routers.values()))

    def compiled_record(self, key: int, num_experts: int, device: torch.device) -> ForwardRecord:
        """Return the record of a stack's compiled forwards, emptied: one for all of them.

        A layer that is skipped this time (layer drop) must not leave its last observation to be counted again.
        """
        if key not in self._compiled_records or self._compiled_records[key].device != device:
            self._compiled_records[key] = ForwardRecord(self.routers[key], num_experts, device)
        record = self._compiled_records[key]
        record.zero()
        record.visited.clear()
        return record

    def add_pending(self, key: int, record: ForwardRecord) -> None:
        """Add what a forward observed to what waits for a commit."""
        pending = self.pending.get(key)
        if pending is None or pending.device != record.device or not pending.is_of(self.routers[key]):
            moved = Observations(self.routers[key], record.num_experts, record.device)
            if pending is not None:
                moved.add(pending)
            pending = self.pending[key] = moved
        record.skip_non_finite()
        pending.add(record)
        self.counted.add(key)

    def forget(self, key: int, rows: Sequence[int]) -> None:
        """Forget what is pending of some routers of a stack, by their number in it."""
        if key in self.pending and len(self.pending[key].routers) > max(rows):
            self.pending[key].zero(rows)

    def gather(self, key: int, num_experts: int, device: torch.device) -> Observations:
        """Return all that is pending of a stack, for the routers that it has now."""
        total = Observations(self.routers[key], num_experts, device)
        if key in self.pending:
            total.add(self.pending[key])
        return total

    def loads_of_last_step(self, key: int, top_ks: list[int], num_experts: int, device: torch.device) -> Tensor:
        """Return the load of a stack's experts in the last step: even in each layer where it is not known.

        Layers that were added or removed begin anew.
        """
        known = self.last_loads.get(key)
        if known is None or known.shape != (len(top_ks), num_experts):
            known = torch.tensor(top_ks).to(torch.float32).unsqueeze(1).repeat(1, num_experts) / num_experts
        self.last_loads[key] = known.to(device)
        return self.last_loads[key]

    def saved_loads(self) -> dict[str, list[list[float]]]:
        """Return the loads of the last step for JSON, which a resumed run needs to go on exactly."""
        return {str(key): loads_LE.tolist() for key, loads_LE in self.last_loads.items()}

    def restore_loads(self, saved: Mapping[str, list[list[float]]]) -> None:
        """Take the loads of the last step from `saved_loads`, in place of those that are known."""
        self.last_loads = {int(key): torch.tensor(loads_LE, dtype=torch.float32) for key, loads_LE in saved.items()}

    def begin_record(self, key: int, num_experts: int, device: torch.device) -> ForwardRecord:
        """Return an empty record for a forward that begins."""
        self._in_backward = False  # the last backward ended in an exception if this was still set
        record = ForwardRecord(self.routers[key], num_experts, device)
        record.generation = self._generation
        return record

    def begin_backward(self) -> None:
        """Note that the backward of a record is under way."""
        self._in_backward = True

    def count(self, key: int, record: ForwardRecord) -> None:
        """Let a record count, once, unless a state dict was loaded since its forward."""
        self._in_backward = False
        if record.counted or record.generation != self._generation:
            return
        record.counted = True
        self.add_pending(key, record)

    def note_outside(self, owner: str, gradient: Tensor) -> None:
        """Note that a backward reached a router that ran outside of its stack's forward: a hook of its logits."""
        self.ran_outside = owner

    def note_step(self, optimizer: torch.optim.Optimizer, held: set[int], is_own: bool, is_foreign: bool) -> None:
        """Note that an optimizer has stepped.

        `held` are identities of its parameters. `is_own` and `is_foreign` say whether parameters of this model, and of
        another Symphony model, are among them.
        """
        own = self._own_optimizer() if self._own_optimizer is not None else None
        if is_own:
            self._own_optimizer = weakref.ref(optimizer)
        elif is_foreign or own is not None:
            return  # sharded optimizers hold flat copies, which cannot be told from another model's parameters
        is_used = bool(self.counted) or self._in_backward
        self.stepped = self.stepped or is_used
        self.has_begun = self.has_begun or is_used
        self.stepped_uncounted = self.stepped_uncounted or (self.evaluated and not is_used)
        if is_used and self.optimizer_parameters is not None:
            self.optimizer_parameters |= held

    def awaits_step(self) -> bool:
        """Whether an optimizer of this model is known, and has not stepped since there is something pending."""
        known = self._own_optimizer is not None and self._own_optimizer() is not None
        return known and not self.stepped

    def finish_commit(self) -> None:
        """Forget what has been committed."""
        self._clear_pending()
        self.stepped = self.loss_recorded = False
        self.evaluated = self.stepped_uncounted = False
        self.commits_without_step = 0
        if self.scale is not None and not torch.compiler.is_compiling():
            self.scale.zero_()  # a loss that is not recorded must not start the routers' with an old factor

    def drop(self) -> None:
        """Drop what is pending, and void the records whose backward has not run: the model's state was replaced."""
        self.finish_commit()
        self.last_loads.clear()
        self._generation += 1

    def begin_training(self) -> None:
        """Drop what an earlier training, or a loop that was broken off within a step, has left for this one."""
        self.drop()
        self.logged_losses = None
        self.has_begun = True

    def _clear_pending(self) -> None:
        for pending in self.pending.values():
            pending.zero()
        self.counted.clear()

    def log_losses(self, losses: Sequence[Tensor]) -> None:
        """Add the balance loss, z-loss and number of forwards of each stack's commit to those of the next log."""
        of_routers = torch.cat(list(losses))
        mean = torch.cat([of_routers[:, :2].sum(0) / len(of_routers), of_routers[:, 2].max().reshape(1)])
        noted = torch.cat([mean.unsqueeze(0), of_routers])
        if self.logged_losses is None or self.logged_losses.shape != noted.shape:  # layers were dropped or added
            self.logged_losses = noted
        else:
            self.logged_losses = self.logged_losses.to(noted.device) + noted

    def take_losses(self) -> dict[str, float]:
        """Return the mean balance and z-loss over layers since the last call; empty without any.

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


def shares_loads(config: SymphonyConfig) -> bool:
    """Whether the balance loss takes a load of more than its own micro-batch."""
    is_wider = config.balance_scope in ("step", "last_step") or (config.balance_scope == "global" and num_ranks() > 1)
    return is_wider and config.balance_loss_weight > 0


def keeps_loads(config: SymphonyConfig) -> bool:
    """Whether the balance loss takes the load of the step before."""
    return config.balance_scope == "last_step" and shares_loads(config)


def parameters_of(optimizer: Any) -> set[int]:
    """Return the identities of the parameters that an optimizer holds; none for None."""
    return {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


def num_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
