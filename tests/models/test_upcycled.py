"""UpcycledMoE computes what a loop over tokens and experts computes, whatever it was made of."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from symphony_hf import UpcycleError
from symphony_hf.models.dense_mlp import read_mlp
from symphony_hf.models.upcycled_moe import UpcycledMoE
from symphony_hf.patching.upcycle_modules import _initialize

HIDDEN, INNER = 12, 20


class Plain(nn.Module):
    """As CLIP, SigLIP and LLaVA's projector have it."""

    def __init__(self, out=HIDDEN, bias=True):
        super().__init__()
        self.act = nn.GELU()
        self.fc1 = nn.Linear(HIDDEN, INNER, bias=bias)
        self.fc2 = nn.Linear(INNER, out, bias=bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    """As Llama has it."""

    def __init__(self, out=HIDDEN, bias=False):
        super().__init__()
        self.down_proj = nn.Linear(INNER, out, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


FORMS = {
    "plain": lambda: Plain(),
    "plain, no bias": lambda: Plain(bias=False),
    "plain, wider": lambda: Plain(out=30),
    "gated": lambda: Gated(),
    "gated, bias": lambda: Gated(bias=True),
    "gated, narrower": lambda: Gated(out=5),
}


def make(form, head="smoe", implementation="grouped_mm", noise=0.0, num_experts=4, top_k=2):
    torch.manual_seed(0)
    mlp = FORMS[form]()
    config = PreTrainedConfig()
    config._experts_implementation = implementation
    moe = UpcycledMoE(read_mlp("mlp", mlp), num_experts, top_k, head, config)
    _initialize(moe, 0.5, noise, torch.Generator().manual_seed(1))
    return mlp, moe


def naive(mlp, moe, x):
    """Each token through each of its experts, one after the other: an MLP like the first with that expert's weights."""
    logits = moe.gate(x)[0]
    state, rows = moe.experts.state_dict(), []
    for token, row in zip(x, logits, strict=True):
        chosen = sorted(range(len(row)), key=lambda e: -float(row[e]))[: moe.gate.top_k]
        total = sum(math.exp(row[e] - max(row)) for e in chosen)
        result = 0
        for e in chosen:
            expert = copy.deepcopy(mlp)
            one = {name: tensor[e] for name, tensor in state.items()}
            if isinstance(mlp, Gated):
                gate, up = one["gate_up_proj"].chunk(2)
                expert.gate_proj.weight.data, expert.up_proj.weight.data = gate, up
                expert.down_proj.weight.data = one["down_proj"]
                if "gate_up_proj_bias" in one:
                    expert.gate_proj.bias.data, expert.up_proj.bias.data = one["gate_up_proj_bias"].chunk(2)
                    expert.down_proj.bias.data = one["down_proj_bias"]
            else:
                expert.fc1.weight.data, expert.fc2.weight.data = one["up_proj"], one["down_proj"]
                if "up_proj_bias" in one:
                    expert.fc1.bias.data, expert.fc2.bias.data = one["up_proj_bias"], one["down_proj_bias"]
            result = result + math.exp(row[e] - max(row)) / total * expert(token)
        rows.append(result)
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["smoe", "xmoe"])
def test_copies_compute_what_the_mlp_did(form, head):
    mlp, moe = make(form, head)
    x = torch.randn(3, 5, HIDDEN)
    # Sums of K weighted copies: a few ulps of numbers of order 1.
    torch.testing.assert_close(moe(x), mlp(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_that_differ_equal_a_loop(form, implementation):
    mlp, moe = make(form, implementation=implementation, noise=0.5)
    x = torch.randn(17, HIDDEN)
    with torch.no_grad():
        wanted = naive(mlp, moe, x)
        torch.testing.assert_close(moe(x), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(wanted, mlp(x), atol=1e-2)


@pytest.mark.parametrize("form", ["plain, wider", "gated"])
def test_gradients_do_not_depend_on_the_implementation(form):
    gradients = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        _, moe = make(form, implementation=implementation, noise=0.5)
        moe(torch.randn(17, HIDDEN, generator=torch.Generator().manual_seed(3))).square().mean().backward()
        gradients.append({name: p.grad for name, p in moe.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


def test_an_expert_without_tokens_and_no_tokens_at_all():
    _, moe = make("plain, wider", num_experts=8, top_k=1)
    assert moe(torch.randn(1, HIDDEN)).shape == (1, 30)
    assert moe(torch.randn(0, HIDDEN)).shape == (0, 30)


@torch.no_grad()
def test_cosine_logits_are_cosines_over_a_temperature():
    _, moe = make("plain", "xmoe")
    x, router = torch.randn(6, HIDDEN), moe.gate
    reduced = x @ router.reduction.weight.T
    for token in range(6):
        for expert in range(4):
            embedding = router.embeddings.weight[expert]
            cosine = float(reduced[token] @ embedding / (reduced[token].norm() * embedding.norm()))
            assert float(router(x)[0][token, expert]) == pytest.approx(cosine / 0.3, abs=1e-5)


class ThreeLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.act = nn.ReLU()


class Scaled(Plain):
    def forward(self, x):
        return 2 * super().forward(x)


class TwoInputs(Plain):
    def forward(self, x, y):
        return super().forward(x) + y


class ATuple(Plain):
    def forward(self, x):
        return super().forward(x), None


class Narrower(Plain):
    def forward(self, x):
        return super().forward(x)[:, 1:]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 4), "is not an MLP"),
        (ThreeLinears(), "not a known MLP.*found a, b, c"),
        (Scaled(), "computes something else"),
        (TwoInputs(), "does not take hidden states alone"),
        (ATuple(), "computes something else"),
        (Narrower(), "computes something else"),
    ],
)
def test_what_is_no_mlp_is_refused(module, message):
    with pytest.raises(UpcycleError, match=message):
        read_mlp("block.mlp", module)


def test_reading_an_mlp_leaves_the_mode_of_each_module():
    mlp = Plain().train()
    mlp.fc1.eval()
    read_mlp("block.mlp", mlp)
    assert [module.training for module in (mlp, mlp.act, mlp.fc1, mlp.fc2)] == [True, True, False, True]
