"""The model once more, by loops over tokens, positions and experts, from what is published of it."""

import torch
import torch.nn.functional as F


def attention(layer, hidden_TD, distance_keys_SD, heads, span):
    """Of one stream, from its beginning: what was before it is zeros."""
    queries, keys, values = (
        p(hidden_TD).unflatten(-1, (heads, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    outputs = torch.zeros_like(queries)
    for position in range(len(hidden_TD)):
        for head in range(heads):
            query = queries[position, head] / queries.shape[-1] ** 0.5
            scores, seen = [], []
            for distance in range(span, 0, -1):
                before = position - distance
                key = keys[before, head] if before >= 0 else torch.zeros_like(query)
                seen.append(values[before, head] if before >= 0 else torch.zeros_like(query))
                scores.append(query @ key + query @ distance_keys_SD[span - distance])
            weights = torch.stack(scores).softmax(0)
            outputs[position, head] = (weights[:, None] * torch.stack(seen)).sum(0)
    return layer.o_proj(outputs.flatten(1))


def logits_of(gate, x):
    if hasattr(gate, "reduction"):
        reduced = gate.reduction(x)
        experts = gate.embeddings.weight
        cosines = [reduced @ e / (reduced.norm() * e.norm()) for e in experts]
        return torch.stack(cosines) / gate.log_temperature.exp()
    return gate.linear.weight @ x + gate.linear.bias


def mixture(moe, hidden_TD, top_k):
    outputs = []
    for x in hidden_TD:
        logits = logits_of(moe.gate, x)
        chosen = logits.topk(top_k)
        output = torch.zeros_like(x)
        for weight, expert in zip(chosen.values.softmax(-1), chosen.indices, strict=True):
            inner = F.relu(moe.experts.up_proj[expert] @ x + moe.experts.up_proj_bias[expert])
            output += weight * (moe.experts.down_proj[expert] @ inner + moe.experts.down_proj_bias[expert])
        outputs.append(output)
    return torch.stack(outputs)


@torch.no_grad()
def forward(model, ids_T):
    """Logits of one stream, read from its beginning in one block. Shape: (T, vocab_size)."""
    config, base = model.config, model.model
    hidden, velocity = base.embed_tokens(ids_T), None
    for layer in base.layers:
        attended = attention(layer.attn, hidden, base.distance_keys, config.num_attention_heads, config.attention_span)
        hidden = layer.norm1(hidden + attended)
        if layer.moe is None:
            hidden = layer.norm3(hidden + layer.ff(hidden))
            continue
        output = mixture(layer.moe, hidden, config.num_experts_per_tok)
        if config.momentum is not None:
            output = config.momentum_step * output
            velocity = output if velocity is None else config.momentum * velocity + output
            output = velocity
        hidden = layer.norm2(hidden + layer.moe_norm(hidden + output))
    return model.lm_head(hidden)
