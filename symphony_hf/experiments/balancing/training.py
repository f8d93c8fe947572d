"""A small model of each family, trained with one way to balance its experts, and measured on each domain."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symphony_hf.diagnostics.routing_metrics import domain_allocation, domain_information
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.replay.contexts import record_routing
from symphony_hf.patching.symphonize import expert_graphs, symphonize

from .domains import SCRIPT, VOCAB, Domain, draw

LEARNING_RATE = 1e-3
ROWS, LENGTH = 4, 32
"""Shape of a micro-batch, which is of one domain."""

HELD_OUT_ROWS = 64
"""Rows of each domain to measure on."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8, "intermediate_size": 32},
    "deepseek_v3": {
        **_EXPERTS,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {**_EXPERTS, "head_dim": 8},
}


def train_and_measure(
    family: str,
    settings: Mapping[str, Any],
    domains: Mapping[str, Domain],
    *,
    seed: int,
    steps: int,
    micro_batches: int,
    specialists: bool = False,
) -> dict[str, float]:
    """Train a small model whose micro-batches alternate between the domains.

    The forward is the stock model's (strength 0). With a decay of 0, the graph's diagonal is the load of the last step.

    Args:
        family: Key of `FAMILIES`.
        settings: Settings of `symphonize` that say how to balance.
        domains: Domains by name.
        seed: Seed of the weights and of the rows, which are the same whatever the settings.
        steps: Number of optimizer steps.
        micro_batches: Number of micro-batches of a step.
        specialists: Whether half of the experts begin as specialists of each script.

    Returns:
        `violation`, the largest load of an expert over the mean load, less 1, of a step, as the mean over layers and
        steps; `last_violation`, over the last quarter of the steps; `information`, that of experts about domains on
        held-out text, from 0 (all experts serve all domains alike) to 1 (none serves two), as the mean over layers;
        `information_before`, before training; and `loss`, the cross-entropy on that text, in nats per character.

    Source: the violation is MaxVio of arXiv 2408.15664. Deviation: by optimizer step, on training tokens.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **_SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    if specialists:
        _specialize(model)
    symphonize(model, strength=0, decay=0.0, z_loss_weight=0.0, **settings)
    before = _measure(model.eval(), domains)["information"]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    generator, parts = torch.Generator().manual_seed(seed), list(domains.values())
    violations = []
    order = itertools.cycle(parts)  # it goes on over the steps, whose number of micro-batches may be odd
    for _ in range(steps):
        for _ in range(micro_batches):
            ids = draw(next(order).train, ROWS, LENGTH, generator)
            (model(ids, labels=ids).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(model)
        violations.append(_violation(torch.stack([graph.diagonal() for graph in expert_graphs(model).values()])))
    last = violations[-max(1, steps // 4) :]
    return {
        "violation": sum(violations) / steps,
        "last_violation": sum(last) / len(last),
        "information_before": before,
        **_measure(model.eval(), domains),
    }


@torch.no_grad()
def _specialize(model: PreTrainedModel) -> None:
    """Make half of the experts specialists of each script, by one direction that embeddings and routers share.

    It is added to the embeddings of one script's tokens and to the rows of half of each router's experts, and
    subtracted from the others. Along it, weights are then shifted by almost three of their standard deviations.
    """
    embeddings_VD: Any = model.get_input_embeddings().weight
    direction_D = torch.randn(embeddings_VD.shape[1])
    direction_D *= embeddings_VD.shape[1] ** 0.5 / 2 / direction_D.norm()
    weights = [embeddings_VD] + [w for name, w in model.named_parameters() if name.endswith("gate.weight")]
    for weight in weights:
        half = SCRIPT if weight is embeddings_VD else len(weight) // 2
        sign = torch.where(torch.arange(len(weight)) < half, 1.0, -1.0)
        weight += weight.std() * sign.unsqueeze(1) * direction_D


def _violation(loads_LE: Tensor) -> float:
    return float((loads_LE.amax(1) / loads_LE.mean(1) - 1).mean())


@torch.no_grad()
def _measure(model: PreTrainedModel, domains: Mapping[str, Domain]) -> dict[str, float]:
    losses, chosen = [], []
    for domain in domains.values():
        ids = draw(domain.held_out, HELD_OUT_ROWS, LENGTH, torch.Generator().manual_seed(0))
        with record_routing(model) as choices:
            losses.append(float(model(ids, labels=ids).loss))
        chosen.append(choices.experts.flatten(1, 2).long())
    num_experts = len(next(iter(expert_graphs(model).values())))
    information = [domain_information(domain_allocation(layer, num_experts)) for layer in zip(*chosen, strict=True)]
    return {"information": sum(information) / len(information), "loss": sum(losses) / len(losses)}
