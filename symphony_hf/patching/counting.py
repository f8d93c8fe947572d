"""The routers of one decoder stack, and what they leave behind on their way through a training forward.

The counting rule. A router's forward *overwrites* its place in the stack's `observed` tensors; hooks around the
decoder stack that owns the routers add them up when that forward was a training one. Gradient checkpointing runs
a layer again during backward, after the hook has added up, so a recomputation never counts. Nothing here is a
buffer: DistributedDataParallel would overwrite the other ranks' counts by rank 0's.
"""

import copy
import functools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symphony_hf.errors import PatchError
from symphony_hf.routing.graph import count_coselections
from symphony_hf.routing.losses import load_balancing_loss, z_loss

from .expert_graph import ExpertGraph, active_graph

if TYPE_CHECKING:
    from .tracker import Tracker


class StackTensors(NamedTuple):
    """What a stack counts in; L is its number of routers. The losses' columns are: balance, z, 1.

    `observed` is overwritten by every forward, `pending` adds up until the commit.
    """

    observed_counts: Tensor  # (L, num_experts, num_experts)
    observed_losses: Tensor  # (L, 3)
    pending_counts: Tensor
    pending_losses: Tensor
    loads: Tensor  # (L, num_experts): the share of all ranks' tokens that chose each expert, in the last forward

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "StackTensors":
        counts = torch.zeros(num_layers, num_experts, num_experts, device=device, dtype=torch.float32)
        losses = torch.zeros(num_layers, 3, device=device, dtype=torch.float32)
        loads = torch.zeros(num_layers, num_experts, device=device, dtype=torch.float32)
        return cls(counts, losses, torch.zeros_like(counts), torch.zeros_like(losses), loads)


class RouterStack:
    """The routers below one module whose forward runs them all, with one number of experts.

    Args:
        owner: That module.
        routers: In the order of their layers; each has its graph in `symphony`.
        blocks: The modules that call them.
        mask_position: Where the owner's forward takes `attention_mask`, when it comes by position.
        tracker: Of the model.

    Attributes:
        active: Whether the forward under way, or the last one, is a training forward.
        mask_T: Its attention mask, flattened, or None. Kept for the recomputation in the backward pass.
        image_T: True for its tokens of images, where the model says so; None where all experts get all tokens.
    """

    def __init__(
        self,
        owner: nn.Module,
        routers: list[nn.Module],
        blocks: list[nn.Module],
        mask_position: int | None,
        tracker: "Tracker",
    ) -> None:
        self.owner = owner
        self.routers = routers
        self.blocks = blocks
        self.child_names = [
            next((name for name, child in block._modules.items() if child is router), "")
            for router, block in zip(routers, blocks, strict=True)
        ]
        self.block_ran: dict[int, bool] = {}  # by place, of the blocks that are watched
        self.visited: set[int] = set()  # places whose routers ran in the forward under way
        self.mask_position = mask_position
        self.tracker = tracker
        self.active = False
        self.mask_T: Tensor | None = None
        self.image_T: Tensor | None = None
        self.tensors: StackTensors | None = None
        self.has_pending = False
        for place, router in enumerate(routers):
            # On the router, not on its graph: PEFT copies the graph, and must not copy the model with it.
            router.__dict__["stack"], router.__dict__["place"] = self, place

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterStack":
        """A copy of a whole model has its own stack; that of one router alone, as PEFT makes, stays in this one."""
        if id(self.owner) not in memo:
            return self
        copied = memo[id(self)] = RouterStack.__new__(RouterStack)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def graphs(self) -> list[ExpertGraph]:
        """The graphs in use now: an adapter may bring its own."""
        return [active_graph(router.symphony) for router in self.routers]  # type: ignore[arg-type]

    @property
    def num_experts(self) -> int:
        return active_graph(self.routers[0].symphony).num_experts  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return active_graph(self.routers[0].symphony).adjacency.device  # type: ignore[arg-type]

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the owner: settle the last step where nothing else does, and get ready to observe."""
        active = module.training and torch.is_grad_enabled()
        self.active = active
        if not active:
            if torch.is_grad_enabled():
                self.tracker.guards.evaluated = True
            return
        # Only when this very stack comes around again: a decoder must not settle what its encoder has just counted.
        if self.has_pending:
            self.tracker.commit_if_forgotten()
        if not torch.compiler.is_compiling():
            self._check_in_place()
        self.tracker.place_scale()
        self._take_mask(self._find_mask(args, kwargs))
        types = kwargs.get("moe_mm_token_type_ids")
        self.image_T = types.reshape(-1).bool() if isinstance(types, Tensor) else None
        tensors = self.place_tensors()
        # A layer that is skipped this time (layer drop) must not leave its last observation to be counted again.
        tensors.observed_counts.zero_()
        tensors.observed_losses.zero_()
        self.visited.clear()

    def _check_in_place(self) -> None:
        """Refuse what was put around, or in the place of, a router that is a linear map, after it was patched.

        LoRA there would add to the smoothed logits its own, which are not smoothed.
        """
        for router, name, block in zip(self.routers, self.child_names, self.blocks, strict=True):
            present = block._modules.get(name)
            if present is router or not isinstance(router, nn.Linear) or hasattr(present, "modules_to_save"):
                continue
            if getattr(present, "stack", None) is self:
                continue  # the copy of it that an adapter trained, merged into the model
            raise PatchError(
                f"the router `{name}` of {type(block).__name__} was replaced by {type(present).__name__} after it was "
                "symphonized, which goes past its graph: leave routers out of `target_modules`, and train them by "
                f"modules_to_save=[{name!r}]"
            )

    def place_tensors(self) -> StackTensors:
        """Have the tensors on the graphs' device."""
        device = self.device
        if self.tensors is None or self.tensors.observed_counts.device != device:
            self.tensors = StackTensors.zeros(len(self.routers), self.num_experts, device)
        return self.tensors

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Post-hook of the owner: add up what this forward's routers observed."""
        if not self.active:
            return
        assert self.tensors is not None
        self.tensors.pending_counts.add_(self.tensors.observed_counts)
        self.tensors.pending_losses.add_(self.tensors.observed_losses)
        self.has_pending = True
        self.visited.clear()  # a recomputation is not a second visit
        if self.balances_over_ranks:
            self._share_loads()

    @property
    def balances_over_ranks(self) -> bool:
        config = self.tracker.config
        return config.balance_scope == "global" and config.balance_loss_weight > 0 and num_ranks() > 1

    @torch.no_grad()
    def _share_loads(self) -> None:
        """Sum the loads of this forward over the ranks: one all-reduce for all layers, before any backward reads."""
        assert self.tensors is not None
        loads_LE = self.tensors.observed_counts.diagonal(dim1=1, dim2=2).contiguous()
        dist.all_reduce(loads_LE)
        top_k = active_graph(self.routers[0].symphony).top_k  # type: ignore[arg-type]
        # Every token chose K experts. A router that saw none has no load.
        self.tensors.loads.copy_(loads_LE / (loads_LE.sum(1, keepdim=True) / top_k).clamp_min(1.0))

    def bypassed_blocks(self) -> list[nn.Module]:
        """Blocks that ran in this step without their router. A router is idle by right where its block is, too.

        Blocks are watched from a step on in which their router was idle, so that a model without such steps pays
        nothing for it.
        """
        assert self.tensors is not None
        idle = (self.tensors.pending_losses[:, 2] == 0).nonzero().flatten().tolist()
        bypassed = [self.blocks[place] for place in idle if self.block_ran.get(place)]
        for place in idle:
            if place not in self.block_ran:
                hook = functools.partial(self._note_block, place)
                self.tracker.handles.append(self.blocks[place].register_forward_pre_hook(hook))
        self.block_ran = dict.fromkeys([*self.block_ran, *idle], False)
        return bypassed

    def _note_block(self, place: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.active:
            self.block_ran[place] = True

    def observe(self, router: Any, logits_TE: Tensor, indices_TK: Tensor) -> Tensor | None:
        """Called by a training router: leave its counts and losses behind, and return the loss to attach.

        Args:
            router: One of this stack, or the copy of one that PEFT trains in its place.
            logits_TE: The logits that chose. Shape: (tokens, num_experts).
            indices_TK: What they chose. Shape: (tokens, top_k).

        Returns:
            This router's share of the weighted losses, a float32 scalar with gradient; None without gradient (the
            first pass of reentrant checkpointing) or weight.
        """
        if not (self.active or torch.is_grad_enabled()):
            return None  # a forward of a training model that no one trains with
        place: int = router.place
        if self.routers[place] is not router:
            self.routers[place] = router
        config = self.tracker.config
        mask_T = self._mask_for(router, logits_TE.shape[0])
        needs_loss = config.weighs_losses and torch.is_grad_enabled() and logits_TE.requires_grad
        with torch.set_grad_enabled(needs_loss):
            load_E = self.tensors.loads[place] if self.balances_over_ranks and self.tensors is not None else None
            balance = load_balancing_loss(logits_TE, indices_TK, mask_T, load_E)
            z = z_loss(logits_TE, mask_T)
            total = (config.balance_loss_weight * balance + config.z_loss_weight * z) / self.tracker.num_routers
        if self.active:
            self._leave_behind(
                place, logits_TE.detach(), indices_TK, mask_T, torch.stack([balance, z, torch.ones_like(z)]).detach()
            )
        return total if needs_loss else None

    @torch.no_grad()
    def _leave_behind(
        self, place: int, logits_TE: Tensor, indices_TK: Tensor, mask_T: Tensor | None, losses: Tensor
    ) -> None:
        assert self.tensors is not None
        finite_T = torch.isfinite(logits_TE).all(-1)
        if mask_T is not None:
            finite_T = finite_T | ~mask_T.to(finite_T.device)
        counts_EE = count_coselections(indices_TK, self.num_experts, mask_T)
        # Top-k of NaN is arbitrary: poison the counts, and `update_adjacency` leaves the graph as it was.
        counts_EE = torch.where(finite_T.all(), counts_EE, torch.full_like(counts_EE, torch.nan))
        # In place: an attribute assigned under torch.compile with checkpointing breaks the graph.
        if place in self.visited:  # layers that are gone through more than once in a forward
            self.tensors.observed_counts[place].add_(counts_EE)
            self.tensors.observed_losses[place].add_(losses)
            return
        self.visited.add(place)
        self.tensors.observed_counts[place].copy_(counts_EE)
        self.tensors.observed_losses[place].copy_(losses)

    def _find_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_position is not None and len(args) > self.mask_position:
            mask = args[self.mask_position]
        if mask is not None and not _is_padding_mask(mask):
            # A 4-D mask, or one for each kind of layer, is causal structure: the model outside was given the padding.
            mask = self.tracker.outer_mask
        return mask.reshape(-1).bool() if _is_padding_mask(mask) else None

    def _take_mask(self, mask_T: Tensor | None) -> None:
        """Keep this forward's mask, unless a backward of the last forward is still to come that needs its own."""
        if self.tracker.awaits_backward and self.balances_over_ranks:
            raise PatchError(
                "two training forwards before one backward, with balance_scope `global`: the first would be balanced "
                "by the load of the second. Run each one's backward before the next forward, or use `local`"
            )
        if self.tracker.awaits_backward and not _same_mask(self.mask_T, mask_T) and _checkpoints(self.owner):
            raise PatchError(
                "two training forwards with different padding before one backward, with gradient checkpointing: the "
                "first would be recomputed with the padding of the second. Put them in one batch, run each one's "
                "backward before the next forward, or turn checkpointing off"
            )
        self.mask_T = mask_T

    def _mask_for(self, router: Any, num_tokens: int) -> Tensor | None:
        mask_T, image_T = self.mask_T, self.image_T
        if router.contract.image_tokens and image_T is None:
            return None  # a vision tower's or projector's: there the text's mask means nothing
        if mask_T is None or mask_T.numel() == num_tokens:
            return mask_T
        gets_images = router.contract.image_tokens
        if gets_images is not None and image_T is not None:
            mask_T = mask_T[image_T if gets_images else ~image_T]
            if mask_T.numel() == num_tokens:
                return mask_T
        self.tracker.guards.warn_once(
            f"the attention mask has {mask_T.numel()} entries, the router {num_tokens} tokens: padding, if there is "
            "any, is counted like other tokens"
        )
        return None


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_padding_mask(mask: Any) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _checkpoints(owner: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in owner.modules())


def _same_mask(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
