"""The arrangements to compare, the small model that they train, and their parts of the batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, OlmoeConfig, OlmoeForCausalLM, PreTrainedModel

from symphony_hf.config import RouterGradient, SymphonyConfig
from symphony_hf.patching.symphonize import symphonize

NUM_STEPS, NUM_ROWS, NUM_TOKENS, LENGTH, VOCAB = 8, 8, 12, 16, 64
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Arrangement:
    """A way to run one optimizer step.

    Attributes:
        accumulation: Micro-batches per step and rank.
        ranks: Number of processes.
        zero: DeepSpeed's ZeRO stage; None for DistributedDataParallel or a single process.
        offload: Whether DeepSpeed keeps the optimizer states on the CPU.
        checkpointing: `reentrant` or `non-reentrant` activation checkpointing; None without.
        packed: Whether sequences are concatenated into a single row without padding.
        compiled: Whether the model is compiled by torch.compile.
        scope: Scope of the balance loss; None without that loss.
        z_loss_weight: Weight of the z-loss; with 0.01 its gradient at the routers is a hundred times the
            cross-entropy's.
        router_gradient: Experts that the routers' gradient takes into account.
        moves_bias: Whether the model is a GLM-4.5, and balanced by moving its correction bias.
        replays: Whether training replays the experts that a model with other weights chooses.
    """

    accumulation: int = 1
    ranks: int = 1
    zero: int | None = None
    offload: bool = False
    checkpointing: str | None = None
    packed: bool = False
    compiled: bool = False
    scope: str | None = None
    z_loss_weight: float = 0.01
    router_gradient: RouterGradient = "chosen"
    moves_bias: bool = False
    replays: bool = False


UNION = "union batch"
UNION_ENTROPY = "union batch, cross-entropy alone"
UNION_BALANCE = "union batch, balance loss"
UNION_NEIGHBOURS = "union batch, neighbours"
UNION_BIAS = "union batch, correction bias"
UNION_REPLAY = "union batch, replay"
UNION_LAST_STEP = "union batch, balance last step"
STEP_BALANCE = "balance step, accumulation 2"
_PLAIN = {
    "accumulation 2": Arrangement(accumulation=2),
    "accumulation 4": Arrangement(accumulation=4),
    "accumulation 8": Arrangement(accumulation=8),
    "checkpointing, reentrant": Arrangement(checkpointing="reentrant"),
    "checkpointing, non-reentrant": Arrangement(checkpointing="non-reentrant"),
    "packed": Arrangement(packed=True),
    "torch.compile": Arrangement(compiled=True),
    "DDP, 2 ranks": Arrangement(ranks=2),
    "DDP, 2 ranks, accumulation 2": Arrangement(ranks=2, accumulation=2),
    "DDP, 2 ranks, checkpointing": Arrangement(ranks=2, checkpointing="non-reentrant"),
    "ZeRO-1, 2 ranks": Arrangement(ranks=2, zero=1),
    "ZeRO-2, 2 ranks": Arrangement(ranks=2, zero=2),
    "ZeRO-3, 2 ranks": Arrangement(ranks=2, zero=3),
    "ZeRO-1, 2 ranks, offload": Arrangement(ranks=2, zero=1, offload=True),
    "ZeRO-2, 2 ranks, offload, accumulation 2": Arrangement(ranks=2, zero=2, offload=True, accumulation=2),
    "ZeRO-3, 2 ranks, offload": Arrangement(ranks=2, zero=3, offload=True),
}
"""Arrangements of the model as it is, by name."""


def _with(kind: str, union: str, names: Sequence[str], **changes: Any) -> dict[str, tuple[Arrangement, str]]:
    """Return some of the plain arrangements with other settings, and the union batch with which they are compared."""
    changed = {f"{kind}, {name}": dataclasses.replace(_PLAIN[name], **changes) for name in names}
    return {name: (arrangement, union) for name, arrangement in {union: Arrangement(**changes), **changed}.items()}


_CHECKPOINTED = ("checkpointing, reentrant", "checkpointing, non-reentrant")
ARRANGEMENTS: dict[str, tuple[Arrangement, str]] = {
    UNION: (Arrangement(), UNION),
    **{name: (arrangement, UNION) for name, arrangement in _PLAIN.items()},
    **_with(
        "cross-entropy alone",
        UNION_ENTROPY,
        ["accumulation 8", "DDP, 2 ranks", "ZeRO-3, 2 ranks"],
        z_loss_weight=0.0,
    ),
    UNION_BALANCE: (Arrangement(scope="local"), UNION_BALANCE),
    "balance local, accumulation 2": (Arrangement(scope="local", accumulation=2), "balance local, accumulation 2"),
    "balance local, DDP, 2 ranks": (Arrangement(scope="local", ranks=2), "balance local, accumulation 2"),
    "balance local, ZeRO-2, 2 ranks": (Arrangement(scope="local", ranks=2, zero=2), "balance local, accumulation 2"),
    "balance local, ZeRO-3, 2 ranks": (Arrangement(scope="local", ranks=2, zero=3), "balance local, accumulation 2"),
    "balance global, DDP, 2 ranks": (Arrangement(scope="global", ranks=2), UNION_BALANCE),
    "balance global, DDP, checkpointing": (
        Arrangement(scope="global", ranks=2, checkpointing="reentrant"),
        UNION_BALANCE,
    ),
    "balance global, ZeRO-2, 2 ranks": (Arrangement(scope="global", ranks=2, zero=2), UNION_BALANCE),
    "balance global, ZeRO-3, 2 ranks": (Arrangement(scope="global", ranks=2, zero=3), UNION_BALANCE),
    **_with(
        "neighbours",
        UNION_NEIGHBOURS,
        ["accumulation 2", *_CHECKPOINTED, "packed", "torch.compile", "DDP, 2 ranks", "ZeRO-2, 2 ranks"],
        router_gradient="neighbours",
    ),
    **_with(
        "correction bias",
        UNION_BIAS,
        [
            *("accumulation 2", *_CHECKPOINTED, "torch.compile"),
            *("DDP, 2 ranks", "DDP, 2 ranks, accumulation 2", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks"),
        ],
        moves_bias=True,
    ),
    **_with(
        "replay",
        UNION_REPLAY,
        ["accumulation 2", *_CHECKPOINTED, "packed", "DDP, 2 ranks", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks"],
        replays=True,
    ),
    **_with(
        "balance last step",
        UNION_LAST_STEP,
        [
            *("accumulation 2", "accumulation 4", *_CHECKPOINTED, "packed", "torch.compile"),
            *("DDP, 2 ranks", "DDP, 2 ranks, accumulation 2", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks"),
        ],
        scope="last_step",
    ),
    # One micro-batch is a step of its own; of two, the first is balanced by itself, and the second by both.
    "balance step, checkpointing": (Arrangement(scope="step", checkpointing="reentrant"), UNION_BALANCE),
    "balance step, DDP, 2 ranks": (Arrangement(scope="step", ranks=2), UNION_BALANCE),
    "balance step, ZeRO-3, 2 ranks": (Arrangement(scope="step", ranks=2, zero=3), UNION_BALANCE),
    **{
        name: (dataclasses.replace(arrangement, scope="step", accumulation=2), STEP_BALANCE)
        for name, arrangement in {
            STEP_BALANCE: Arrangement(),
            "balance step, accumulation 2, reentrant": Arrangement(checkpointing="reentrant"),
            "balance step, accumulation 2, non-reentrant": Arrangement(checkpointing="non-reentrant"),
            "balance step, accumulation 2, packed": Arrangement(packed=True),
            "balance step, accumulation 2, torch.compile": Arrangement(compiled=True),
            "balance step, accumulation 2, DDP, 2 ranks": Arrangement(ranks=2),
            "balance step, accumulation 2, DDP, checkpointing": Arrangement(ranks=2, checkpointing="non-reentrant"),
            "balance step, accumulation 2, ZeRO-2, 2 ranks": Arrangement(ranks=2, zero=2),
            "balance step, accumulation 2, ZeRO-3, 2 ranks": Arrangement(ranks=2, zero=3),
        }.items()
    },
}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_model(arrangement: Arrangement, seed: int = 0) -> PreTrainedModel:
    """Build a small symphonized OLMoE or GLM-4.5, with the same weights for every arrangement."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if arrangement.moves_bias:
        experts = {"n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "head_dim": 8}
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**_SIZES, **experts)).float()
    else:
        model = OlmoeForCausalLM(OlmoeConfig(**_SIZES, num_experts=8, intermediate_size=16)).float()
    # Eager experts run only where they got tokens. ZeRO-3 needs every rank to run the same modules.
    is_whole = arrangement.compiled or arrangement.zero == 3
    model.set_experts_implementation("batched_mm" if is_whole else "eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20)  # far from ties, so that rounding changes no choice
    balance = 0.0 if arrangement.scope is None else 0.1
    scope: Any = arrangement.scope or "local"
    symphonize(
        model,
        decay=0.8,
        balance_loss_weight=balance,
        z_loss_weight=arrangement.z_loss_weight,
        balance_scope=scope,
        router_gradient=arrangement.router_gradient,
        balance="bias" if arrangement.moves_bias else "loss",
        bias_rate=0.01 if arrangement.moves_bias else SymphonyConfig.bias_rate,
    )
    if arrangement.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": arrangement.checkpointing == "reentrant"})
    return model.train()


def micro_batches(arrangement: Arrangement, step: int, rank: int) -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of one rank in a step. All ranks together run the same rows at once as a single one.

    All rows have the same number of tokens, with padding on either or both sides, so that all parts weigh the same.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCAB, (NUM_ROWS, NUM_TOKENS), generator=generator)
    num_parts = arrangement.accumulation * arrangement.ranks
    size = NUM_ROWS // num_parts
    for part in range(rank, num_parts, arrangement.ranks):
        rows = tokens[part * size : (part + 1) * size]
        yield _packed(rows) if arrangement.packed else _padded(rows)


def _padded(rows: Tensor) -> dict[str, Tensor]:
    shape = (len(rows), LENGTH)
    ids, labels, mask = torch.zeros(shape).long(), torch.full(shape, -100), torch.zeros(shape).long()
    for row, tokens in enumerate(rows):
        first = row % (LENGTH - NUM_TOKENS + 1)
        span = slice(first, first + NUM_TOKENS)
        ids[row, span], mask[row, span], labels[row, span] = tokens, 1, tokens
        labels[row, first] = -100  # no token before it to predict it from
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def _packed(rows: Tensor) -> dict[str, Tensor]:
    labels = rows.clone()
    labels[:, 0] = -100
    positions = torch.arange(NUM_TOKENS).repeat(len(rows))
    flat = {"input_ids": rows.reshape(1, -1), "labels": labels.reshape(1, -1)}
    return {**flat, "position_ids": positions.unsqueeze(0)}
