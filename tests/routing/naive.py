"""What routing means, as plain Python loops over tokens and experts in double precision, and how to compare.

Nothing here calls `symphony_hf`. The references take and return lists (`tensor.tolist()` is exact), so that they
share no formula, no broadcasting and no rounding with the code under test.
"""

import math
import random

import torch
from hypothesis import settings
from hypothesis import strategies as st

NORMALIZATIONS = ["row", "conditional", "symmetric", "centred"]
EPS32 = 2.0**-24  # the most by which one float32 operation can be off, relative to its result

few = settings(deadline=None, derandomize=True, max_examples=15)
many = settings(deadline=None, derandomize=True, max_examples=30)


# References


def count(indices, num_experts, mask=None):
    counts = [[0] * num_experts for _ in range(num_experts)]
    for token, chosen in enumerate(indices):
        if mask is None or mask[token]:
            for j in chosen:
                for k in chosen:
                    counts[j][k] += 1
    return counts


def moving_average(adjacency, counts, num_tokens, decay):
    size = len(adjacency)
    return [
        [decay * adjacency[j][k] + (1 - decay) * counts[j][k] / num_tokens for k in range(size)] for j in range(size)
    ]


def transition(adjacency, normalization="row", self_loops=True):
    size = len(adjacency)
    if normalization == "centred":
        return centred(adjacency)
    heard = [[adjacency[j][k] if self_loops or j != k else 0.0 for k in range(size)] for j in range(size)]
    mass = [sum(row) for row in heard]
    result = [[0.0] * size for _ in range(size)]
    for j in range(size):
        for k in range(size):
            if mass[j] == 0:
                result[j][k] = 1.0 if j == k else 0.0
            elif heard[j][k] == 0:
                result[j][k] = 0.0
            elif normalization == "row":
                result[j][k] = heard[j][k] / mass[j]
            elif normalization == "conditional":
                result[j][k] = heard[j][k] / adjacency[j][j]
            else:
                result[j][k] = heard[j][k] / math.sqrt(mass[j] * mass[k])
    return result


def centred(adjacency):
    """The identity, plus each probability of k given j, less what is expected from how often experts meet."""
    size = len(adjacency)
    met = [sum(adjacency[j][k] for k in range(size) if k != j) for j in range(size)]
    total = sum(met)
    share = [m / (total - m) if total else 1.0 for m in met]
    result = [[1.0 if j == k else 0.0 for k in range(size)] for j in range(size)]
    for j in range(size):
        if adjacency[j][j] == 0 or met[j] == 0:
            continue
        shared = sum(share[k] for k in range(size) if k != j)
        for k in range(size):
            if k != j:
                result[j][k] = (adjacency[j][k] - met[j] * share[k] / shared) / adjacency[j][j]
    return result


def mix(transition_, strength):
    size = len(transition_)
    return [
        [(1 - strength) * (1.0 if j == k else 0.0) + strength * transition_[j][k] for k in range(size)]
        for j in range(size)
    ]


def smooth(logits, matrix):
    result = []
    for token in logits:
        smoothed = []
        for j in range(len(matrix)):
            total = 0.0
            for k in range(len(token)):
                total += matrix[j][k] * token[k]
            smoothed.append(total)
        result.append(smoothed)
    return result


def logsumexp(token):
    top = max(token)
    return top + math.log(sum(math.exp(g - top) for g in token))


def softmax(logits):
    result = []
    for token in logits:
        partition = logsumexp(token)
        result.append([math.exp(g - partition) for g in token])
    return result


def spread(probabilities, matrix):
    """p_j' = sum_k p_k A_kj."""
    result = []
    for token in probabilities:
        mixed = [0.0] * len(matrix)
        for k in range(len(matrix)):
            for j in range(len(matrix)):
                mixed[j] += token[k] * matrix[k][j]
        result.append(mixed)
    return result


def load_balancing(logits, indices, mask=None):
    num_experts = len(logits[0])
    chosen = [0.0] * num_experts
    given = [0.0] * num_experts
    tokens = 0
    for token, probabilities in enumerate(softmax(logits)):
        if mask is None or mask[token]:
            tokens += 1
            for j in range(num_experts):
                given[j] += probabilities[j]
                if j in indices[token]:
                    chosen[j] += 1
    return num_experts * sum((chosen[j] / tokens) * (given[j] / tokens) for j in range(num_experts))


def z(logits, mask=None):
    total, tokens = 0.0, 0
    for token, row in enumerate(logits):
        if mask is None or mask[token]:
            total += logsumexp(row) ** 2
            tokens += 1
    return total / tokens


def slope(function, rows, eps=1e-5):
    """Central differences of a naive function of a list of rows, one entry at a time, in double precision."""
    result = []
    for i in range(len(rows)):
        slopes = []
        for j in range(len(rows[i])):
            values = []
            for step in (eps, -eps):
                moved = [list(row) for row in rows]
                moved[i][j] += step
                values.append(function(moved))
            slopes.append((values[0] - values[1]) / (2 * eps))
        result.append(slopes)
    return result


# Comparisons


def assert_near(actual, expected, rtol, atol=0.0):
    """Compare a tensor with a reference's numbers, in double precision."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol)


def assert_same_bits(actual, expected):
    """Same type, same shape, same bits: not even a zero's sign may differ."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = actual.detach().contiguous().view(integer) != expected.detach().contiguous().view(integer)
    assert not different.any(), f"{actual[different][:4].tolist()} is not {expected[different][:4].tolist()}"


# Inputs


def choose(num_tokens, num_experts, top_k, seed=0, never=()):
    """The experts of each token: distinct, unevenly popular, `never` left out. A list of lists."""
    generator = random.Random(seed)
    experts = [j for j in range(num_experts) if j not in never]
    chosen = []
    for _ in range(num_tokens):
        # The least of a few draws: low numbers are popular, so that loads differ.
        order = sorted(experts, key=lambda j: generator.random() * (j + 1))
        chosen.append(order[:top_k])
    return chosen


def random_graph(num_experts, seed=0, silent=()):
    """A symmetric graph as counts make it: no pair is chosen more often than either expert. Float32."""
    generator = random.Random(seed)
    rows = [[0.0] * num_experts for _ in range(num_experts)]
    for j in range(num_experts):
        if j not in silent:
            rows[j][j] = generator.uniform(0.5, 1.0)
        for k in range(j):
            if j not in silent and k not in silent and generator.random() < 0.7:
                rows[j][k] = rows[k][j] = generator.uniform(0.01, 0.5)
    return torch.tensor(rows)


def random_stochastic(num_experts, seed=0):
    """A dense row-stochastic matrix, not symmetric. Float32."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_experts):
        row = [generator.uniform(0.05, 1.0) for _ in range(num_experts)]
        rows.append([value / sum(row) for value in row])
    return torch.tensor(rows)


@st.composite
def selections(draw, max_tokens=10, max_experts=8):
    """(indices, num_experts, top_k): each token's distinct experts, from no token to a few."""
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, num_experts))
    token = st.permutations(range(num_experts)).map(lambda order: list(order[:top_k]))
    return draw(st.lists(token, max_size=max_tokens)), num_experts, top_k


@st.composite
def graphs(draw, max_experts=7):
    """A graph with any pattern of edges, experts without any included."""
    num_experts = draw(st.integers(1, max_experts))
    silent = draw(st.sets(st.integers(0, num_experts - 1)))
    return random_graph(num_experts, draw(st.integers(0, 10**6)), silent)


def as_indices(chosen, top_k, dtype=torch.int64):
    return torch.tensor(chosen, dtype=dtype).reshape(len(chosen), top_k)
