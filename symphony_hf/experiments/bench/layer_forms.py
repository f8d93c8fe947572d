"""The forms of one decoder layer at the true shapes of large models, their steps, and the memory of a step."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symphony_hf.patching.attachment import add_router_losses, update_graphs
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import is_symphonized, symphonize, symphony_routers

from .timing import DECAY

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "deepseek-v3-router": {  # its experts are 2,048 wide, and have 45 GB in float32
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 64,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 0,
    },
}
PROMPT, NEW_TOKENS = 8, 32
"""Tokens of a generation: given, and generated with a cache."""

BARE_LAYERS = 16
"""Layers of a bare form: a model's own hooks run once a forward, not once a layer. The models have 16 to 61."""


_NARROWED = ("intermediate_size", "moe_intermediate_size", "head_dim", "q_lora_rank", "kv_lora_rank")
"""Widths that are 8 in a bare form. Its attention is left out, but it is built first."""


class _NoAttention(nn.Module):
    """Stands in for a decoder layer's attention."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def build_forms(
    name: str, device: torch.device, dtype: torch.dtype, is_bare: bool = False
) -> dict[str, PreTrainedModel]:
    """Build the three forms of a decoder layer. They share all parameters but their routers'.

    Args:
        name: A key of SHAPES.
        device: Where they are.
        dtype: Type of the weights.
        is_bare: Whether to build BARE_LAYERS layers without attention and with experts 8 wide, so that little but the
            router is left.

    Returns:
        The `stock`, `symphony` and `folded` models, which compute the same outputs, also after training steps.
    """
    shape = {**SHAPES[name], **{key: 8 for key in _NARROWED if is_bare and key in SHAPES[name]}}
    tokens = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": None}
    config = AutoConfig.for_model(**shape, num_hidden_layers=BARE_LAYERS if is_bare else 1, **tokens)
    torch.manual_seed(0)
    with torch.device(device):
        symphony = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if is_bare:
        for layer in symphony.model.layers:
            layer.self_attn = _NoAttention()
    shared = {id(p): p for p_name, p in symphony.named_parameters() if not p_name.endswith("gate.weight")}
    stock, folded = (copy.deepcopy(symphony, memo=dict(shared)) for _ in range(2))
    for model in (symphony, folded):
        symphonize(model, decay=DECAY)
        for seed, (_, router) in enumerate(symphony_routers(model)):
            graph = active_graph(router.symphony)
            random = torch.rand(graph.num_experts, graph.num_experts, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                # Mostly diagonal, as a learned graph is, so that the routing stays as even as the stock one's.
                graph.adjacency.add_((0.02 * (random + random.T)).to(device) * graph.adjacency.diagonal().mean())
    routers = [name for name, _ in symphony_routers(folded)]
    fold(folded)
    for name in routers:  # into a model that was never symphonized
        stock.get_submodule(name).load_state_dict(folded.get_submodule(name).state_dict())
    return {"stock": stock, "symphony": symphony, "folded": folded}


def training_step(model: PreTrainedModel, inputs: Tensor) -> None:
    """Run a forward and a backward pass; with graphs also the router losses, the counts and the update."""
    if not model.training:
        model.train()
    loss = model(inputs_embeds=inputs.requires_grad_()).logits.float().square().mean()
    if not is_symphonized(model):
        loss.backward()
    else:
        add_router_losses(model, loss).backward()
        update_graphs(model)
    model.zero_grad(set_to_none=True)


def fitting_inputs(model: PreTrainedModel, tokens: int) -> Tensor:
    """Return random inputs of a number of tokens, or of half as many until a training step fits into memory."""
    weight = next(model.parameters())
    while True:
        inputs = torch.randn(1, tokens, model.config.hidden_size, device=weight.device, dtype=weight.dtype)
        try:
            training_step(model, inputs)
            return inputs
        except (torch.OutOfMemoryError, MemoryError):
            if tokens == 1:
                raise
        except RuntimeError as error:
            if "can't allocate memory" not in str(error) or tokens == 1:  # the message of PyTorch's CPU allocator
                raise
        tokens //= 2


def watched(model: PreTrainedModel, step: Callable[[], None]) -> Callable[[], None]:
    """Return a step of a model that RoutingMonitor watches, with the log that it then makes."""
    from transformers import TrainerControl, TrainerState  # slow to import, as the next

    from symphony_hf.training.routing_monitor import RoutingMonitor

    monitor, state, control = RoutingMonitor(pictures=False), TrainerState(logging_steps=1), TrainerControl()
    arguments: Any = SimpleNamespace(output_dir=".", logging_strategy="steps")  # the attributes that it reads
    monitor.on_train_begin(arguments, state, control, model=model)

    def run() -> None:
        monitor.on_step_begin(arguments, state, control, model=model)
        step()
        monitor.on_log(arguments, state, control, model=model, logs={"loss": 0.0})

    return run


@torch.inference_mode()
def inference_step(model: PreTrainedModel, inputs: Tensor) -> None:
    """Run a forward pass."""
    if model.training:  # a walk over the modules, which would be counted
        model.eval()
    model(inputs_embeds=inputs)


def generation_step(model: Any, prompt: Tensor) -> None:
    """Generate NEW_TOKENS tokens with a cache, greedily."""
    model.eval()
    model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


def peak_bytes(model: PreTrainedModel, step: Callable[[], None]) -> int:
    """Return the bytes of a model's weights and graphs, and the peak of what two steps allocate.

    Two, for what a step leaves behind, such as counts. Workspaces inside a kernel are not seen.
    """
    from symphony_hf.training.planning.step import LiveBytes  # slow to import

    held = [*model.parameters(), *model.buffers()]
    with LiveBytes(held) as live:
        step()
        step()
    return sum(tensor.nbytes for tensor in held) + live.peak
