"""Recorded routing against routers' outputs and against loops, and removal of the hooks."""

import pytest
import torch
from gates import ModelOfTopKGates, PlainModel, make_home_made
from models import make_ids, make_model, move_graphs
from torch import nn

from symphony_hf import expert_graphs, symphonize
from symphony_hf.errors import UnsupportedModelError
from symphony_hf.evaluation.routing.drop_first_expert import first_expert_dropped
from symphony_hf.evaluation.routing.expert_outputs import sampling_experts
from symphony_hf.evaluation.routing.hooks import routers_to_watch, watching_routers
from symphony_hf.experiments.conformance.batches import tiny_batch
from symphony_hf.experiments.conformance.naive import watch_choices
from symphony_hf.experiments.conformance.tiny import moe_families, tiny_model

IDS = make_ids(2, 9)


def run(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run_tiny(model):
    with torch.no_grad():
        return model(**{name: value for name, value in tiny_batch(model).items() if name != "labels"}).logits


def test_a_stock_model_is_watched(family):
    model = make_model(family)
    with watching_routers(model) as seen:
        run(model)
    with torch.no_grad():
        recorded = model(IDS, output_router_logits=True).router_logits
    top_k = model.config.num_experts_per_tok
    assert list(seen) == [name for name in dict(model.named_modules()) if name.endswith((".gate", ".router"))]
    for (routed,), logits in zip(seen.values(), recorded, strict=True):
        assert torch.equal(routed.logits_TE, logits.view(routed.logits_TE.shape))
        assert torch.equal(routed.indices_TK.sort(-1).values, logits.topk(top_k).indices.sort(-1).values)


@pytest.mark.parametrize("smoothing", ["logits", "scores"])
@pytest.mark.parametrize("family", ["gemma4_text", "mixtral", "longcat_flash"])
def test_a_symphonized_model_shows_its_smoothed_logits(family, smoothing):
    """Gemma 4 does not return its logits: whoever watches gets them told, two at a time, and nobody afterwards."""
    model = move_graphs(symphonize(tiny_model(family), smoothing=smoothing)).eval()
    with watching_routers(model) as seen, watching_routers(model) as also:
        run_tiny(model)
    graphs = expert_graphs(model)
    for name, (routed,) in seen.items():
        router = routers_to_watch(model)[name].module
        assert router.logit_notes == ()
        assert torch.equal(also[name][0].logits_TE, routed.logits_TE)
        assert routed.logits_TE.shape == (24, len(graphs[name]))
        if family != "longcat_flash":  # which adds a bias to choose by
            highest = routed.logits_TE.topk(routed.indices_TK.shape[1]).indices
            assert torch.equal(routed.indices_TK.sort(-1).values, highest.sort(-1).values)


def test_layers_without_a_graph_are_watched_too():
    model = symphonize(make_model(), layers=(1,))
    assert len(expert_graphs(model)) == 1
    assert len(routers_to_watch(model)) == 3


@pytest.mark.parametrize("model_class", [PlainModel, ModelOfTopKGates])
def test_gates_of_ones_own_are_watched(model_class):
    """An `nn.Linear` in a block, and one whose weight is read by the module around it, which the user names."""
    named = {"routers": "*.moe.gate"} | ({} if model_class is PlainModel else {"top_k": 2})
    model = move_graphs(symphonize(make_home_made(model_class), **named)).eval()
    with watching_routers(model) as seen, torch.no_grad():
        model(IDS % 64)
    blocks = [layer["moe"] for layer in model.layers]
    assert [len(calls) for calls in seen.values()] == [1, 1, 1]
    for block, (routed,) in zip(blocks, seen.values(), strict=True):
        assert torch.equal(routed.indices_TK, routed.logits_TE.topk(2).indices)
        if model_class is PlainModel:
            assert torch.equal(routed.indices_TK, block.last_choice)


def test_nothing_is_left_behind():
    model = make_model()
    before = hooks_of(model)
    with watching_routers(model), first_expert_dropped(model), sampling_experts(model, torch.arange(2)):
        assert hooks_of(model) == before + 9
    assert hooks_of(model) == before
    with pytest.raises(ZeroDivisionError), watching_routers(model), first_expert_dropped(model):
        _ = 1 / 0
    assert hooks_of(model) == before


class Naive:
    """Stands where a router was, and does without the first expert, token by token."""

    def __init__(self, router, renormalized):
        self.router, self.renormalized = router, renormalized

    def __call__(self, module, args, output):
        logits = output[0]
        weights, indices = torch.zeros_like(output[1]), torch.zeros_like(output[2])
        for token, row in enumerate(logits):
            left = [expert for expert in range(len(row)) if expert != int(row.argmax())]
            left.sort(key=lambda expert, row=row: -float(row[expert]))
            shares = row[left].double().softmax(0)[: weights.shape[1]]
            weights[token] = shares / shares.sum() if self.renormalized else shares
            indices[token] = torch.tensor(left[: weights.shape[1]])
        return logits, weights, indices


@pytest.mark.parametrize("graphs", [False, True], ids=["stock", "symphonized"])
@pytest.mark.parametrize(("family", "renormalized"), [("mixtral", True), ("olmoe", False)])
def test_the_next_expert_takes_the_first_ones_place(family, renormalized, graphs):
    model = make_model(family)
    if graphs:
        model = move_graphs(symphonize(model)).eval()
    with first_expert_dropped(model):
        dropped = run(model)
    assert (dropped - run(model)).abs().max() > 1e-3
    for router in routers_to_watch(model).values():
        router.module.register_forward_hook(Naive(router.module, renormalized))
    # Weights in float64 here; logits are of order 0.1.
    torch.testing.assert_close(dropped, run(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    ["dbrx", "gemma4_text", "phimoe", "jetmoe", "switch_transformers", "afmoe", "deepseek_v3", "ernie4_5_moe"],
)
def test_other_routers_do_without_their_first_expert(family):
    """Also where a bias of the router, of its block or of a module in it chooses: it would choose some again."""
    model = tiny_model(family)
    if model.config.model_type == "deepseek_v3":
        lift_biases(model)
    with watching_routers(model) as seen:
        run_tiny(model)
    with first_expert_dropped(model):
        reached = watch_choices(model)
        run_tiny(model)
    first_run = {"jetmoe": "model.layers.0.self_attention.experts.router"}.get(family, next(iter(seen)))
    before, after = seen[first_run][0], reached[first_run][0]
    chosen = before.indices_TK.long()
    first = chosen.gather(1, before.logits_TE.gather(1, chosen).argmax(1, keepdim=True))
    assert not (after == first).any()
    assert not torch.equal(after, before.indices_TK)


def lift_biases(model):
    """Two experts of DeepSeek-V3's first group are chosen whatever their scores."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer[1], buffer[2] = 3.0, 2.5


class NaiveDeepSeek:
    """DeepSeek-V3's router without the expert of the highest logit among the chosen, token by token."""

    def __init__(self, config, bias):
        self.config, self.bias = config, bias.double()

    def choose(self, scores, gone):
        config = self.config
        size = len(scores) // config.n_group
        groups = [range(start, start + size) for start in range(0, len(scores), size)]
        biased = {expert: float(scores[expert] + self.bias[expert]) for expert in range(len(scores)) if expert != gone}
        best_two = [sum(sorted(biased[expert] for expert in group if expert in biased)[-2:]) for group in groups]
        best = sorted(range(len(groups)), key=lambda number: -best_two[number])[: config.topk_group]
        left = [expert for number in best for expert in groups[number] if expert in biased]
        return sorted(left, key=lambda expert: -biased[expert])[: config.num_experts_per_tok]

    def __call__(self, module, args, output):
        logits = output[0]
        weights, indices = torch.zeros_like(output[1]), torch.zeros_like(output[2])
        for token, row in enumerate(logits):
            scores = row.double().sigmoid()
            first = max(self.choose(scores, None), key=lambda expert, row=row: float(row[expert]))
            indices[token] = torch.tensor(self.choose(scores, first))
            shares = scores[indices[token]]
            weights[token] = shares / shares.sum() * self.config.routed_scaling_factor
        return logits, weights, indices


@pytest.mark.parametrize("graphs", [False, True], ids=["stock", "symphonized"])
def test_a_bias_does_not_choose_the_first_expert_again(graphs):
    model = tiny_model("deepseek_v3")
    lift_biases(model)
    if graphs:
        model = move_graphs(symphonize(model)).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with first_expert_dropped(model):
        dropped = run_tiny(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.config.norm_topk_prob
    for router in routers_to_watch(model).values():
        naive = NaiveDeepSeek(model.config, router.module.e_score_correction_bias)
        router.module.register_forward_hook(naive)
    # Weights in float64 here; logits are of order 0.1.
    torch.testing.assert_close(dropped, run_tiny(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "reason"), [("inkling_text", "compete"), ("muse_spark", "same weights")])
def test_routers_whose_head_does_not_run_alone_are_refused(family, reason):
    if family not in moe_families():
        pytest.skip("this transformers does not have it")
    model = tiny_model(family)
    before = hooks_of(model)
    with pytest.raises(UnsupportedModelError, match=reason), first_expert_dropped(model):
        run_tiny(model)
    assert hooks_of(model) == before


def test_every_expert_is_run_on_the_same_tokens():
    model = make_model("mixtral")
    places = torch.tensor([0, 5, 17])
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
    with sampling_experts(model, places) as samples:
        run(model)
    for sample in samples:
        experts = model.get_submodule(sample.name.rpartition(".")[0]).experts
        hidden = inputs[sample.name.rpartition(".")[0] + ".experts"].reshape(-1, 32)[places]
        assert torch.equal(sample.hidden_TD, hidden)
        with torch.no_grad():
            outputs = list(sample.outputs())
            assert len(outputs) == 6
            for expert, output in enumerate(outputs):
                gate, up = (experts.gate_up_proj[expert] @ hidden.T).chunk(2)
                wanted = (experts.down_proj[expert] @ (nn.functional.silu(gate) * up)).T
                torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "reason"), [("jetmoe", "no module `experts`"), ("llama4_text", "do not take")])
def test_experts_that_cannot_be_run_one_by_one_are_refused(family, reason):
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=reason), sampling_experts(model, torch.arange(2)):
        run_tiny(model)
