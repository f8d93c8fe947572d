"""SmoothSMoE's router: against a loop over tokens, continuous where the linear one jumps, and with a graph."""

import math

import pytest
import torch

from symphony_hf import expert_graphs, fold, symphonize, update_graphs
from symphony_hf.errors import ConfigError
from symphony_hf.models.routers import LinearRouter, SmoothRouter
from symphony_hf.models.wikitext.configuration import WikiTextMoeConfig
from symphony_hf.models.wikitext.modeling import WikiTextMoeForCausalLM

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "attention_span": 6, "num_experts": 5, "router_type": "smooth"}


def naive(logits, top_k, width):
    """Expert -> weight, of one token with one expert lifted in."""
    order = sorted(range(len(logits)), key=lambda expert: -logits[expert])
    values = {expert: logits[expert] for expert in order[:top_k]}
    near = order[top_k]
    u = 1 - (logits[order[top_k - 1]] - logits[near]) / width
    if u > 0:
        values[near] = logits[near] - math.log(1 + math.exp(50 * math.log(max(1 - u, 1e-7)) - math.log(u)))
    total = sum(math.exp(value) for value in values.values())
    return {expert: math.exp(value) / total for expert, value in values.items()}


def make(router=SmoothRouter, **settings):
    torch.manual_seed(0)
    made = router(16, 5, 2, bias=True, **settings)
    with torch.no_grad():
        made.linear.weight.normal_(std=0.2)
    return made


def test_it_weighs_as_a_loop_does():
    router, hidden = make(width=0.3), torch.randn(200, 16)
    logits, weights, indices = router(hidden)
    num_near = 0
    for token in range(200):
        expected = naive(logits[token].tolist(), 2, 0.3)
        found = dict(zip(indices[token].tolist(), weights[token].tolist(), strict=True))
        num_near += len(expected) == 3
        for expert, weight in found.items():
            assert weight == pytest.approx(expected.get(expert, 0.0), abs=1e-5)
    assert 20 < num_near < 180  # both kinds of tokens are here


def test_where_none_is_near_it_is_the_linear_one():
    hidden = torch.randn(50, 16)
    _, weights, indices = make(width=1e-6)(hidden)
    _, linear_weights, linear_indices = make(LinearRouter)(hidden)
    assert torch.equal(indices[:, :2], linear_indices)
    torch.testing.assert_close(weights[:, :2], linear_weights)
    assert not weights[:, 2].any()


@pytest.mark.parametrize(("router", "jumps"), [(LinearRouter, True), (SmoothRouter, False)])
def test_its_weights_do_not_jump_where_experts_trade_places(router, jumps):
    made = router(1, 4, 2, bias=True)
    with torch.no_grad():
        made.linear.weight.copy_(torch.tensor([[0.0], [0.0], [1.0], [0.0]]))
        made.linear.bias.copy_(torch.tensor([2.0, 1.0, 1.0, -5.0]))
        # Around 0 the third expert takes the second's place.
        _, weights, indices = made(torch.tensor([[-1e-5], [1e-5]]))
    dense = torch.zeros(2, 4).scatter(1, indices, weights)
    assert (float((dense[0] - dense[1]).abs().max()) > 0.2) == jumps


def test_gradients_are_finite_at_a_tie_and_far_from_one():
    router = make(width=0.3)
    with torch.no_grad():
        router.linear.weight[1] = router.linear.weight[0]
        router.linear.bias.zero_()
    hidden = torch.cat([torch.zeros(1, 16), torch.randn(20, 16)]).requires_grad_()
    router(hidden)[1].square().sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(router.linear.weight.grad).all()


def test_a_model_of_it_has_a_graph_of_its_two_highest(tmp_path):
    torch.manual_seed(0)
    model = WikiTextMoeForCausalLM(WikiTextMoeConfig(**TINY)).eval()
    ids = torch.randint(50, (2, 12))
    before = model(ids).logits
    symphonize(model, decay=0.0, balance_loss_weight=0.0, z_loss_weight=0.0)
    assert torch.equal(model(ids).logits, before)
    model.train()
    recorded = model(ids, labels=ids, output_router_logits=True, logits_to_keep=0)
    recorded.loss.backward()
    update_graphs(model)
    for graph, logits in zip(expert_graphs(model).values(), recorded.router_logits, strict=True):
        counts = torch.zeros(5, 5)
        for token in logits:
            for j in token.topk(2).indices.tolist():
                for k in token.topk(2).indices.tolist():
                    counts[j, k] += 1
        torch.testing.assert_close(graph, counts / len(logits))
    model.eval()
    smoothed = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = WikiTextMoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, smoothed)
    torch.testing.assert_close(fold(loaded)(ids).logits, smoothed)


def test_its_scores_can_be_smoothed():
    torch.manual_seed(0)
    model = WikiTextMoeForCausalLM(WikiTextMoeConfig(**TINY)).eval()
    ids = torch.randint(50, (2, 12))
    before = model(ids).logits
    symphonize(model, smoothing="scores")
    torch.testing.assert_close(model(ids).logits, before)


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="lower num_experts_per_tok"):
        WikiTextMoeConfig(**{**TINY, "num_experts_per_tok": 5})
    with pytest.raises(ConfigError, match="did you mean `smooth`"):
        WikiTextMoeConfig(**{**TINY, "router_type": "smoth"})
