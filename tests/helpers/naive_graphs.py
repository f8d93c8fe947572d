"""The graph by its definition, one token and one pair of experts at a time, and a spy on what routers choose."""

import torch

from symphony_hf.patching.symphonize import symphony_routers

DECAY = 0.9


def spy_on_selections(model):
    """Every router's selections, as its family's own forward returns them."""
    seen = {name: [] for name, _ in symphony_routers(model)}
    for name, router in symphony_routers(model):
        router.register_forward_hook(lambda m, args, out, name=name: seen[name].append(out[2].detach().clone()))
    return seen


def naive_update(adjacency, selections, masks, decay=DECAY):
    """The formula, token by token and pair by pair, in Python floats."""
    size = len(adjacency)
    counts, num_tokens = [[0] * size for _ in range(size)], 0
    for chosen, mask in zip(selections, masks, strict=True):
        for token, keep in zip(chosen.tolist(), mask, strict=True):
            if keep:
                num_tokens += 1
                for j in token:
                    for k in token:
                        counts[j][k] += 1
    return torch.tensor(
        [
            [decay * float(adjacency[j][k]) + (1 - decay) * counts[j][k] / num_tokens for k in range(size)]
            for j in range(size)
        ]
    )


def naive_transition(adjacency, strength, normalization="row", self_loops=True):
    """A by its definition, one entry at a time."""
    size = len(adjacency)
    matrix = [[0.0] * size for _ in range(size)]
    for j in range(size):
        row = [float(adjacency[j][k]) if self_loops or j != k else 0.0 for k in range(size)]
        divisor = float(adjacency[j][j]) if normalization == "conditional" else sum(row)
        for k in range(size):
            matrix[j][k] = (1 - strength) * (j == k) + strength * row[k] / divisor
    return torch.tensor(matrix)
