"""MoE blocks as loops over tokens and experts, by each family's own formula."""

import torch
from torch.nn import functional as F

FAMILIES = ["deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen3_moe"]


def swiglu(experts, number, x):
    gate, up = (experts.gate_up_proj[number] @ x).chunk(2)
    return experts.down_proj[number] @ (F.silu(gate) * up)


def gpt_oss_expert(experts, number, x):
    both = x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
    gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
    return inner @ experts.down_proj[number] + experts.down_proj_bias[number]


def route_mixtral(router, x, allowed):
    """Return (expert, weight) of each choice among the allowed experts."""
    probabilities = (router.weight[allowed] @ x).softmax(-1)
    chosen = probabilities.topk(router.top_k).indices.tolist()
    total = sum(probabilities[place] for place in chosen)
    return [(allowed[place], probabilities[place] / total) for place in chosen]


def route_gpt_oss(router, x, allowed):
    logits = router.weight[allowed] @ x + router.bias[allowed]
    best = logits.topk(router.top_k)
    weights = best.values.softmax(-1)
    return [(allowed[place], weight) for place, weight in zip(best.indices.tolist(), weights, strict=True)]


EXPERT = {"mixtral": swiglu, "gpt_oss": gpt_oss_expert}
ROUTE = {"mixtral": route_mixtral, "gpt_oss": route_gpt_oss}


def parts(family, block):
    """Return the block's router and experts."""
    return (block.gate, block.experts) if family == "mixtral" else (block.router, block.experts)


def inputs_of(model, blocks, ids):
    """Return the inputs and outputs of each block. Shape of each: (tokens, hidden size)."""
    seen = {}

    def note(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in blocks]
