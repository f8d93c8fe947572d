"""The router losses by their formulas, token by token, and their gradients on a plain model."""

import torch
from models import gradients

WEIGHTS = {"balance_loss_weight": 0.5, "z_loss_weight": 0.25}


def naive_router_losses(router_logits, top_k, mask=None):
    """Mean over layers of (balance, z) by the papers' formulas, token by token."""
    balances, zs = [], []
    for logits in router_logits:
        keep = [True] * len(logits) if mask is None else mask.flatten().bool().tolist()
        rows = [row for row, kept in zip(logits, keep, strict=True) if kept]
        num_experts = logits.shape[1]
        chosen = torch.zeros(num_experts)
        for row in rows:
            for expert in row.topk(top_k).indices.tolist():
                chosen[expert] += 1 / len(rows)
        probability = sum(row.softmax(-1) for row in rows) / len(rows)
        balances.append(num_experts * (chosen * probability).sum())
        zs.append(sum(torch.logsumexp(row, 0) ** 2 for row in rows) / len(rows))
    return sum(balances) / len(balances), sum(zs) / len(zs)


def reference_gradients(model, batches, divide_by=None, ce=True):
    """Of mean over micro-batches of (cross-entropy + weighted router losses), on a plain, unpatched model."""
    top_k = model.config.get_text_config().num_experts_per_tok
    for inputs in batches:
        out = model(**inputs, output_router_logits=True)
        balance, z = naive_router_losses(out.router_logits, top_k, inputs.get("attention_mask"))
        loss = WEIGHTS["balance_loss_weight"] * balance + WEIGHTS["z_loss_weight"] * z
        if ce:
            loss = loss + out.loss
        (loss / (divide_by or len(batches))).backward()
    return gradients(model)


def assert_gradients(actual, expected, scale=1.0):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Float32 sums in another order, over two backward passes.
        torch.testing.assert_close(
            actual[name] * scale, gradient, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
