"""The Symphony routers of one decoder stack, as they are in the model now."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from symphony_hf.errors import PatchError

from .correction_bias import correction_bias
from .expert_graph import active_graph, put_aside
from .training_checks import TrainingChecks
from .training_state import TrainingState

_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "num_selected_experts", "moe_top_k", "k")
"""Attributes under which blocks keep the number of experts that they choose."""


class StackRouters:
    """Finds a stack's routers before each training forward: layers may be dropped, copied, reordered or replaced.

    Args:
        counter: The stack's counter, to which each router is given.
        key: The counter's number in its model.
        owner: The module whose forward runs all the routers.
        routers: The routers in layer order; each has its graph in `symphony`.
        state: The model's training state, which lists the routers of each stack.
        checks: The model's training checks.
    """

    def __init__(
        self,
        counter: Any,
        key: int,
        owner: nn.Module,
        routers: list[Any],
        state: TrainingState,
        checks: TrainingChecks,
    ) -> None:
        self.counter = counter
        self.key = key
        self.owner = owner
        self.state = state
        self.checks = checks
        self._block_ran: dict[int, bool] = {}  # by row, of the blocks that are watched
        self._watches: list[Any] = []
        self._adopt(routers)
        self._num_stock = self._count_stock(owner.modules())

    @property
    def routers(self) -> list[Any]:
        return self.state.routers[self.key]

    def find(self) -> None:
        """Find the routers that are in the model now, and check that the number of chosen experts can be followed.

        Raises:
            PatchError: If something took the place of a router, or the number of chosen experts changed, and this
                family's cannot be followed.
        """
        modules = list(self.owner.modules())
        aside = put_aside(modules)
        found = [
            module
            for module in modules
            if "contract" in module.__dict__ and id(module) not in aside and self._is_own(module)
        ]
        self._refuse_replaced(modules, found)
        if not found:
            self.checks.warn_once(
                f"no Symphony router is left in {type(self.owner).__name__}: what was symphonized was replaced, so "
                "nothing is counted. Call `unsymphonize(model)`, then `symphonize(model)` on the model as it is now"
            )
            return
        present = self.routers
        if len(found) != len(present) or any(a is not b for a, b in zip(found, present, strict=True)):
            self._block_ran.clear()
            while self._watches:
                self._watches.pop().remove()  # it would note another router's row
            self._adopt(found)
        if self._count_stock(modules) > self._num_stock:
            self.checks.warn_once(
                f"{type(self.owner).__name__} has routers that were put in after `symphonize`, and route without a "
                "graph: `unsymphonize(model)`, then `symphonize(model)` again"
            )
        for name, block, chosen in self._top_ks:
            if getattr(block, name) != chosen:
                raise PatchError(
                    f"{type(block).__name__}.{name} is {getattr(block, name)} and was {chosen} when the model was "
                    "symphonized: the number of experts that this family chooses cannot be followed. Call "
                    "`unsymphonize(model)`, change it, then `symphonize(model)` again"
                )

    def _refuse_replaced(self, modules: list[nn.Module], found: list[Any]) -> None:
        """Refuse a module in the place of a router or of what is around it, which routes without the graph.

        A layer that was dropped or moved has nothing in its place: its list is shorter, or another one. Nor does a
        module without parameters, such as an Identity, route.
        """
        kept = {id(router) for router in found if hasattr(router, "base_class")}
        if all(id(router) in kept for router in self.routers):
            return
        present = set(map(id, modules))
        for router, above in zip(self.routers, self._above, strict=True):
            if id(router) in present and hasattr(router, "base_class"):
                continue
            parent, name, size = next(entry for entry in above if id(entry[0]) in present)
            now = parent._modules.get(name)
            is_shorter = isinstance(parent, nn.ModuleList) and len(parent) != size
            if now is None or is_shorter or isinstance(now, nn.ModuleList) or any(id(m) in kept for m in now.modules()):
                continue
            if next(now.parameters(), None) is None:
                continue
            path = ".".join(entry[1] for entry in reversed(above))
            raise PatchError(
                f"the router `{path}` of {type(self.owner).__name__} was replaced after `symphonize`: `{name}` of "
                f"{type(parent).__name__} is a {type(now).__name__} now, which goes past its graph. Turn off what put "
                "it there (engines such as DeepSpeed's AutoEP bring MoE blocks of their own), or `unsymphonize(model)` "
                "before it"
            )

    def check_in_place(self) -> None:
        """Refuse a module that was put around, or in the place of, a linear router after `symphonize`.

        LoRA there would add its own logits, which are not smoothed, to the smoothed ones.

        Raises:
            PatchError: If there is one.
        """
        for router, (block, name) in zip(self.routers, self._homes, strict=True):
            present = block._modules.get(name)
            if present is router or not isinstance(router, nn.Linear) or hasattr(present, "modules_to_save"):
                continue
            if getattr(present, "stack", None) is self.counter:
                continue  # the copy of it that an adapter trained, merged into the model
            raise PatchError(
                f"the router `{name}` of {type(block).__name__} was replaced by {type(present).__name__} after it was "
                "symphonized, which goes past its graph: leave routers out of `target_modules`, and train them by "
                f"modules_to_save=[{name!r}]"
            )

    def correction_biases(self) -> list[Tensor]:
        """Return the correction bias of each router, where all of them have one."""
        return [
            correction_bias(router.contract, router, block)
            for router, (block, _) in zip(self.routers, self._homes, strict=True)
        ]

    def bypassed_blocks(self, ran_L: Tensor) -> list[nn.Module]:
        """Return the blocks that ran in this step without their router. A router is rightly idle where its block is.

        A block is watched from the first step on in which its router was idle, so that a model without such steps pays
        nothing.

        Args:
            ran_L: The number of forwards in which each router ran. Shape: (number of routers,).
        """
        idle = (ran_L == 0).nonzero().flatten().tolist()
        if not idle:
            return []
        blocks = [block for block, _ in self._homes]
        bypassed = [blocks[row] for row in idle if self._block_ran.get(row)]
        for row in idle:
            if row not in self._block_ran:
                hook = functools.partial(self._note_block, row)
                self._watches.append(blocks[row].register_forward_pre_hook(hook))
                self.counter.handles.append(self._watches[-1])
        self._block_ran = dict.fromkeys([*self._block_ran, *idle], False)
        return bypassed

    def _note_block(self, row: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.counter.active:
            self._block_ran[row] = True

    def _is_own(self, router: Any) -> bool:
        counter = router.__dict__.get("stack")
        is_others = counter is not None and counter is not self.counter and counter.state is self.state
        return not is_others and active_graph(router.symphony).num_experts == router.contract.num_experts

    def _adopt(self, routers: list[Any]) -> None:
        self.state.routers[self.key] = routers
        for index, router in enumerate(routers):
            # On the router, not on its graph: PEFT copies the graph, and must not copy the model with it.
            router.__dict__["stack"], router.__dict__["layer_index"] = self.counter, index
        parents = {
            id(child): (module, name, len(module._modules))
            for module in self.owner.modules()
            for name, child in module.named_children()
        }
        self._above = [self._find_above(router, parents) for router in routers]
        self._homes = self._find_homes()
        self._top_ks = list(self._chosen_by_blocks())

    def _find_above(self, router: nn.Module, parents: dict[int, Any]) -> list[tuple[nn.Module, str, int]]:
        """Return each module around a router, innermost first, with its child's name and its number of children."""
        above, module = [], router
        while id(module) in parents and module is not self.owner:
            above.append(parents[id(module)])
            module = above[-1][0]
        return above

    def _find_homes(self) -> list[tuple[nn.Module, str]]:
        """Return each router's calling block and its name there, past PEFT's wrappers."""
        homes = []
        for above in self._above:
            around = [(self.owner, ""), *((module, name) for module, name, _ in reversed(above))]
            while isinstance(around[-1][0], nn.ModuleDict) or "modules_to_save" in around[-1][0]._modules:
                around.pop()
            homes.append(around[-1])
        return homes

    def _count_stock(self, modules: Iterable[nn.Module]) -> int:
        """Count the routers that are not patched."""
        classes = tuple({router.base_class for router in self.routers} - {nn.Linear})
        return sum(isinstance(module, classes) and "contract" not in module.__dict__ for module in modules)

    def _chosen_by_blocks(self) -> Iterator[tuple[str, nn.Module, int]]:
        for router, (block, _) in zip(self.routers, self._homes, strict=True):
            contract = router.contract
            if contract.indices is None and contract.choices is None:
                for holder in (block, router):
                    for name in _TOP_K_NAMES:
                        if type(getattr(holder, name, None)) is int and getattr(holder, name) == contract.top_k:
                            yield name, holder, contract.top_k
