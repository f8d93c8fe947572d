"""The routers of one decoder stack, and the hooks that record their choices; README.md states the counting rule."""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from symphony_hf.config import SymphonyConfig
from symphony_hf.routing.graph import count_coselections
from symphony_hf.routing.losses import load_and_probability, weigh_probability, z_loss

from .expert_graph import ExpertGraph, active_graph, is_functional
from .observations import ForwardRecord, backward_starts, in_backward
from .padding import OF_DECODER, is_padding_mask, mask_of_tokens, mask_position
from .stack_routers import StackRouters
from .training_checks import TrainingChecks
from .training_state import TrainingState, keeps_loads, num_ranks, shares_loads


class CoselectionCounter:
    """Counts co-selections of the routers below one module whose forward runs them all, with one number of experts.

    Args:
        key: The counter's number in its model.
        owner: The module.
        routers: The routers in layer order; each has its graph in `symphony`.
        mask_name: The argument of the models around the owner that says which of its tokens are padding.
        tracker: The model's tracker, which has its training state and its checks.

    Attributes:
        active: Whether the forward under way, or the last one, is a training forward.
        record: The record of the forward under way, or of the one whose backward is under way.
        handles: Hooks that are to be removed with the counter's own.
    """

    def __init__(
        self,
        key: int,
        owner: nn.Module,
        routers: list[nn.Module],
        mask_name: str,
        tracker: Any,
    ) -> None:
        self.key = key
        self.owner = owner
        self.mask_name = mask_name
        self.mask_position = mask_position(owner)
        self.tracker = tracker
        self.state: TrainingState = tracker.state
        self.checks: TrainingChecks = tracker.checks
        self.active = False
        self.record: ForwardRecord | None = None
        self._counted_graphs: list[ExpertGraph] = []
        self.handles: list[Any] = [
            owner.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            owner.register_forward_hook(self.after_forward),
            owner.register_load_state_dict_post_hook(self.after_load),
        ]
        self.placed = StackRouters(self, key, owner, routers, self.state, self.checks)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CoselectionCounter":
        """Copy the counter with its model, whichever stack is first. A router copied alone, by PEFT, stays in this."""
        if id(self.owner) not in memo and id(self.state) not in memo:
            return self
        copied = memo[id(self)] = CoselectionCounter.__new__(CoselectionCounter)
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "record": None}, memo))
        return copied

    @property
    def routers(self) -> list[Any]:
        return self.state.routers[self.key]

    @property
    def graphs(self) -> list[ExpertGraph]:
        """The graphs in use now: an adapter may bring its own."""
        return [active_graph(router.symphony) for router in self.routers]

    @property
    def counted_graphs(self) -> list[ExpertGraph]:
        """The graphs that the last training forward used. Its adapter may be off when they move, for a reference."""
        return self._counted_graphs or self.graphs

    @property
    def num_experts(self) -> int:
        return active_graph(self.routers[0].symphony).num_experts

    @property
    def config(self) -> SymphonyConfig:
        return active_graph(self.routers[0].symphony).config

    @property
    def device(self) -> torch.device:
        return active_graph(self.routers[0].symphony).adjacency.device

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the owner: commit the last step if the loop did not, and begin a record where one trains."""
        self.active = module.training and torch.is_grad_enabled() and not is_functional()
        if not self.active:
            if torch.is_grad_enabled():
                self.state.evaluated = True
            self.tracker.commit_alone()  # already done where the whole model runs
            return
        self.checks.refuse_replica(module)
        self.tracker.settle()
        self.tracker.place_scale()
        if torch.compiler.is_compiling():
            self._counted_graphs = []  # those in use, which a compiler does not list
            self.record = self.state.compiled_record(self.key, self.num_experts, self.device)
        else:
            self.checks.refuse_join()
            self.placed.find()
            self.placed.check_in_place()
            self._note_graphs()
            self.record = self.state.begin_record(self.key, self.num_experts, self.device)
        if keeps_loads(self.config):
            self.record.loads_LE.copy_(self.last_loads())
        self.record.mask_T = self._find_mask(args, kwargs)
        types = kwargs.get("moe_mm_token_type_ids")
        self.record.image_T = types.reshape(-1).bool() if isinstance(types, Tensor) else None

    def _note_graphs(self) -> None:
        """Note the graphs in use, which a commit moves. Counts made with another adapter's graphs are dropped."""
        before, self._counted_graphs = self._counted_graphs, self.graphs
        is_pending = self.key in self.state.counted and len(before) == len(self.graphs)
        changed = [row for row, graph in enumerate(self.graphs) if is_pending and graph is not before[row]]
        if changed:
            self.state.forget(self.key, changed)
            self.checks.warn_once(
                "another adapter was set between two micro-batches of a step, so what the first has counted is left "
                "out: call `optimizer.step()` and `symphony_hf.update_graphs(model)` before `set_adapter`"
            )

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook of the owner: let the record count when its backward has run."""
        record = self.record
        if not self.active or record is None:
            return
        if shares_loads(self.config):
            if not keeps_loads(self.config):
                self._share_loads(record)
            # Logged is the loss whose gradient the routers get.
            record.losses_L3[:, 0] = self.num_experts * (record.loads_LE * record.probabilities_LE).sum(1)
        if torch.compiler.is_compiling():
            self.state.add_pending(self.key, record)
            record.visited.clear()
            return
        record.closed = True
        reached = backward_starts(output)
        for tensor in reached:
            tensor.register_hook(functools.partial(self._begin_backward, record))
        if not reached:
            self.state.count(self.key, record)

    def _begin_backward(self, record: ForwardRecord, gradient: Tensor) -> None:
        """Hook of the stack's output: the backward of its forward begins."""
        self.record = record  # for layers that are recomputed
        if not record.counted:
            self.state.begin_backward()
            # When this backward has run to its end, and not if it is broken off.
            Variable._execution_engine.queue_callback(functools.partial(self.state.count, self.key, record))

    def after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Hook of `load_state_dict`: what was observed belongs to another state."""
        self.state.drop()

    @torch.no_grad()
    def _share_loads(self, record: ForwardRecord) -> None:
        """Sum the loads over the step so far, where the scope is `step`, and over the ranks, before any backward.

        It costs one all-reduce for all layers. The step so far is what is pending: it counts by the same rule, and is
        committed or dropped with it. A recomputation reads the load that its own forward had.
        """
        totals_LF = record.counts_by_expert()
        if self.config.balance_scope == "step":
            totals_LF += self.state.gather(self.key, self.num_experts, self.device).counts_by_expert()
        if num_ranks() > 1:
            dist.all_reduce(totals_LF)
        # A router that saw no token has no load.
        record.loads_LE.copy_(totals_LF[:, :-1] / totals_LF[:, -1:].clamp_min(1.0))

    def last_loads(self) -> Tensor:
        """Return the load of the last step, by which this one is balanced: even, without a gradient, before the first.

        It is the same for every micro-batch, however a step is split.
        """
        top_ks = [graph.top_k for graph in self.graphs]
        return self.state.loads_of_last_step(self.key, top_ks, self.num_experts, self.device)

    @torch.no_grad()
    def keep_loads(self, counts_LEE: Tensor, tokens_L: Tensor) -> None:
        """Keep the load of the step that is being committed. A router without tokens keeps its last."""
        last_LE, tokens_L1 = self.last_loads(), tokens_L.unsqueeze(1)
        loads_LE = counts_LEE.diagonal(dim1=1, dim2=2) / tokens_L1.clamp_min(1.0)
        last_LE.copy_(torch.where(tokens_L1 > 0, loads_LE, last_LE))

    def observe(self, router: Any, logits_TE: Tensor, indices_TK: Tensor) -> Tensor | None:
        """Record what a training router chose, and return the loss to attach.

        Args:
            router: One of this stack's routers, or PEFT's copy that is trained in its place.
            logits_TE: The logits that chose. Shape: (tokens, num_experts).
            indices_TK: The chosen experts. Shape: (tokens, top_k).

        Returns:
            This router's share of the weighted losses, a float32 scalar with gradient; None without gradient (the
            first pass of reentrant checkpointing) or weight, or where no forward of the stack is open.
        """
        record = self.record
        if is_functional() or not (self.active or torch.is_grad_enabled()):
            return None  # a forward of a training model that nobody trains with
        if record is None or self._is_outside():
            return None
        row = record.rows.get(id(router), router.layer_index)
        config = self.config
        active_graph(router.symphony).top_k = indices_TK.shape[1]
        mask_T = mask_of_tokens(record, router.contract, logits_TE.shape[0], self.checks)
        needs_loss = config.weighs_losses and torch.is_grad_enabled() and logits_TE.requires_grad
        with torch.set_grad_enabled(needs_loss):
            load_E = record.loads_LE[row] if shares_loads(config) else None
            share_E, probability_E = load_and_probability(logits_TE, indices_TK, mask_T)
            balance = weigh_probability(share_E, probability_E, load_E)
            z = z_loss(logits_TE, mask_T)
            total = (config.balance_loss_weight * balance + config.z_loss_weight * z) / self.state.num_routers
        if self.active and not record.closed:
            losses = torch.stack([balance, z, torch.ones_like(z)]).detach()
            self._write(record, row, logits_TE.detach(), indices_TK, mask_T, losses, probability_E.detach())
        return total if needs_loss else None

    def _is_outside(self) -> bool:
        """Whether a router runs while no forward of the stack is open, and no backward that recomputes one."""
        record = self.record
        return not torch.compiler.is_compiling() and (record is None or (record.closed and not in_backward()))

    def watch_outside(self, carrier: Tensor) -> None:
        """Note a backward that reaches a router which ran outside of the stack's forward: nothing counted it.

        Args:
            carrier: The router's output that the experts use.
        """
        if carrier.requires_grad and self._is_outside() and not is_functional():
            carrier.register_hook(functools.partial(self.state.note_outside, type(self.owner).__name__))

    @torch.no_grad()
    def _write(
        self,
        record: ForwardRecord,
        row: int,
        logits_TE: Tensor,
        indices_TK: Tensor,
        mask_T: Tensor | None,
        losses: Tensor,
        probability_E: Tensor,
    ) -> None:
        finite_T = torch.isfinite(logits_TE).all(-1)
        tokens = torch.full_like(losses[0], len(logits_TE))
        if mask_T is not None:
            finite_T = finite_T | ~mask_T.to(finite_T.device)
            tokens = mask_T.sum().to(losses)
        counts_EE = count_coselections(indices_TK, self.num_experts, mask_T)
        # Top-k of NaN is arbitrary: poison the counts, and `add_pending` leaves this router's out.
        counts_EE = torch.where(finite_T.all(), counts_EE, torch.full_like(counts_EE, torch.nan))
        written = [(record.counts_LEE, counts_EE), (record.tokens_L, tokens), (record.losses_L3, losses)]
        if shares_loads(self.config):
            written.append((record.probabilities_LE, probability_E))
        for total, value in written:
            # In place: an attribute assigned under torch.compile with checkpointing breaks the graph.
            if row in record.visited:  # a layer that a forward goes through more than once
                total[row].add_(value)
            else:
                total[row].copy_(value)
        record.visited.add(row)

    def _find_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_position is not None and len(args) > self.mask_position:
            mask = args[self.mask_position]
        if not is_padding_mask(mask) and (mask is not None or self.mask_name == OF_DECODER):
            # A 4-D mask, or one for each kind of layer, is causal structure: the model outside was given the padding.
            # A decoder whose inputs are made of labels is given no mask.
            is_unknown = mask is not None and not self.state.masks.tells_padding(self.mask_name)
            if is_unknown and not torch.compiler.is_compiling():
                self.checks.warn_once(
                    f"{type(self.owner).__name__} was given an attention mask that does not say which tokens are "
                    "padding: padding, if there is any, is counted like other tokens. Pass a mask of shape (rows, "
                    "positions), or call the model around it with one"
                )
            mask = self.state.masks.find(self.mask_name)
        return mask.reshape(-1).bool() if is_padding_mask(mask) else None
