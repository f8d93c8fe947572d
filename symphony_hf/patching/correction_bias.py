"""Loss-free balancing: the correction bias of a router, by which it chooses experts and does not weigh them, is moved.

Transformers keeps this bias as a buffer without an update rule. It is saved, resumed and exported as that buffer.

Source: arXiv 2408.15664, b_i <- b_i + u sign(mean load - load_i). Deviation: the load is that of the optimizer step's
tokens on all ranks, without padding, as the graphs count them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from symphony_hf.config import SymphonyConfig
from symphony_hf.errors import ConfigError, PatchError
from symphony_hf.patching.families.contract import RouterContract
from symphony_hf.patching.families.discovery import FoundRouter


def check_correction_biases(model: nn.Module, found: list[FoundRouter], settings: SymphonyConfig) -> None:
    """Refuse balance `bias` where a router has no correction bias that can be moved.

    Raises:
        ConfigError: If a router chooses by its scores alone.
        PatchError: If a bias is not a whole float32 tensor.
    """
    if settings.balance != "bias":
        return
    modules = dict(model.named_modules())
    for router in found:
        if router.contract.correction_bias is None:
            raise ConfigError(
                f"symphony: `balance` is 'bias', but {type(router.module).__name__} `{router.name}` chooses by its "
                "scores alone, without a correction bias that could be moved: use balance='loss'"
            )
        correction_bias(router.contract, router.module, modules[router.name.rpartition(".")[0]])


def correction_bias(contract: RouterContract, router: nn.Module, block: nn.Module) -> Tensor:
    """Return a router's correction bias.

    Args:
        contract: The router's contract.
        router: The router.
        block: The module that calls it.

    Raises:
        PatchError: If it is not a whole float32 tensor: in bfloat16 small steps are lost, and FSDP and ZeRO-3 leave
            each rank a part.
    """
    assert contract.correction_bias is not None
    path, _, name = contract.correction_bias.rpartition(".")
    bias: Any = getattr((block if contract.bias_in_block else router).get_submodule(path), name)
    if bias.dtype != torch.float32 or bias.numel() != contract.num_experts or hasattr(bias, "to_local"):
        raise PatchError(
            f"symphony: `{contract.correction_bias}` of {type(router).__name__} is {bias.dtype} with {bias.numel()} "
            f"entries, and balance='bias' moves {contract.num_experts} in float32: keep it in float32 and whole on "
            "each rank, or use balance='loss'"
        )
    return bias


def adapter_remedy(contract: RouterContract, holder: str) -> str:
    """Return the argument of `lora_config` with which an adapter holds a router's correction bias, for error messages.

    Args:
        contract: The router's contract.
        holder: Name of the module that holds the bias: the router or its block.
    """
    return f"modules_to_save=[{holder.rpartition('.')[2]!r}]" if contract.bias_in_block else "router='train'"


@torch.no_grad()
def move_bias(bias: Tensor, load_E: Tensor, rate: float) -> None:
    """Raise the bias of experts with less than the mean load, and lower that of experts with more, in place.

    Args:
        bias: Shape: num_experts entries.
        load_E: Tokens that chose each expert. Shape: (num_experts,). The bias stays where there is none, or it is not
            finite.
        rate: Step, up or down.
    """
    load_E = load_E.to(bias.device)
    step_E = torch.sign(load_E.mean() - load_E)
    bias.add_((rate * torch.where(torch.isfinite(load_E).all(), step_E, torch.zeros_like(step_E))).view_as(bias))
