"""Routers of remote code that choose themselves, in the forms that they have beside those of transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gates import EXPERTS, HIDDEN, VOCAB, LinearGateBlock
from models import move_graphs
from torch import nn

from symphony_hf import (
    ConfigError,
    UnsupportedModelError,
    add_router_losses,
    expert_graphs,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.families.named_gates import find_gates
from symphony_hf.patching.families.probe import LinearSpy
from symphony_hf.patching.folding import folded_parameters

TOP_K, DECAY = 2, 0.5


class Gate(nn.Module):
    """Returns logits, weights and indices."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x):
        logits = F.linear(x, self.weight)
        return logits, *self.choose(logits)

    def choose(self, logits):
        return logits.softmax(-1).topk(TOP_K)


class Scaled(Gate):
    def forward(self, x):
        logits, weights, indices = super().forward(x)
        return logits, 2.5 * weights, indices


class OfOneWidth(Gate):
    def forward(self, x):
        logits = F.linear(x.reshape(-1, HIDDEN), self.weight)
        return logits, *self.choose(logits)


class MoEGate(Gate):
    """As remote code of DeepSeek has it."""

    def forward(self, x):
        weights, indices = self.choose(F.linear(x.reshape(-1, x.shape[-1]), self.weight))
        return indices, weights, None


class SigmoidScores(Gate):
    def forward(self, x):
        scores = F.linear(x, self.weight).sigmoid()
        return scores, *scores.topk(TOP_K)


class Biased(Gate):
    """Has a bias of the name that a linear map's has."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.rand(EXPERTS))


class ChoosesByBias(Biased):
    def choose(self, logits):
        scores = logits.sigmoid()
        indices = (scores + self.bias).topk(TOP_K).indices
        return scores.gather(-1, indices), indices


class ChoosesByBiasAlone(ChoosesByBias):
    """DeepSeek's own inference code: no logits in the output."""

    def forward(self, x):
        return self.choose(F.linear(x, self.weight))


class WeighsByBias(Biased):
    def choose(self, logits):
        return (logits.sigmoid() + self.bias).topk(TOP_K)


class WeighsBySoftmaxOfChosen(Biased):
    def choose(self, logits):
        scores, indices = (logits.sigmoid() + self.bias).topk(TOP_K)
        return scores.softmax(-1), indices


class BiasAfterTheProduct(Biased):
    """The bias is a part of logits that it does not return."""

    def forward(self, x):
        return self.choose(F.linear(x, self.weight) + self.bias)


class BiasInTheProduct(Biased):
    def forward(self, x):
        logits = F.linear(x, self.weight, self.bias)
        return logits, *self.choose(logits)


class Block(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x):
        parts = [part for part in self.gate(x) if part is not None and part.shape[-1] == TOP_K]
        weights, self.last_choice = sorted(parts, key=lambda part: not part.is_floating_point())
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, self.last_choice.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (weights.unsqueeze(-1) * chosen).sum(1)


def make(gate_class, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(Block(gate_class())).to(dtype)
    return symphonize(model, routers="0.gate", decay=DECAY, **settings)


def transition(gate):
    adjacency = gate.symphony.adjacency
    return adjacency / adjacency.sum(1, keepdim=True)


@pytest.mark.parametrize("gate_class", [MoEGate, SigmoidScores, ChoosesByBias, ChoosesByBiasAlone, Scaled])
def test_a_step_is_trained_and_the_graph_counts_the_choices(gate_class):
    model = make(gate_class).train()
    before = expert_graphs(model)["0.gate"]
    add_router_losses(model, model(torch.randn(9, HIDDEN)).square().mean()).backward()
    assert update_graphs(model)
    assert model[0].gate.weight.grad.abs().sum() > 0
    pairs = torch.zeros(EXPERTS, EXPERTS)
    for chosen in model[0].last_choice.tolist():
        for j in chosen:
            for k in chosen:
                pairs[j, k] += 1
    wanted = DECAY * before + (1 - DECAY) * pairs / 9
    torch.testing.assert_close(expert_graphs(model)["0.gate"], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["logits", "scores"])
@pytest.mark.parametrize("gate_class", [MoEGate, SigmoidScores, ChoosesByBias, ChoosesByBiasAlone, Scaled])
def test_the_losses_get_the_logits_and_the_experts_their_weights(gate_class, smoothing):
    model = move_graphs(make(gate_class, smoothing=smoothing)).eval()
    gate, x, seen = model[0].gate, torch.randn(9, HIDDEN), []
    gate.logit_notes = (seen.append,)
    outputs = gate(x)
    raw, mix = F.linear(x, gate.weight), transition(gate)
    if smoothing == "logits":
        wanted = raw @ mix.T
    elif gate_class in (MoEGate, Scaled):
        wanted = (raw.softmax(-1) @ mix).log() + raw.logsumexp(-1, keepdim=True)
    else:
        wanted = (raw.sigmoid() @ mix.T).logit()
    # Float32 rounding of sums of six terms.
    torch.testing.assert_close(seen[0], wanted, rtol=1e-4, atol=1e-5)
    weights, indices = gate.choose(wanted)
    if gate_class is SigmoidScores:
        weights, indices = wanted.sigmoid().topk(TOP_K)
    got = {part.is_floating_point(): part for part in outputs if part is not None and part.shape[-1] == TOP_K}
    assert torch.equal(got[False], indices)
    factor = 2.5 if gate_class is Scaled else 1.0
    torch.testing.assert_close(got[True], factor * weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate_class", [MoEGate, ChoosesByBiasAlone])
def test_in_16_bits_they_fold_to_the_bit(gate_class):
    model = move_graphs(make(gate_class, torch.bfloat16)).eval()
    gate, x = model[0].gate, torch.randn(9, HIDDEN, dtype=torch.bfloat16)
    ours, plain = gate(x), unsymphonize(copy.deepcopy(model))[0].gate
    with torch.no_grad():
        plain.weight.copy_(folded_parameters(model)["0.gate.weight"])
    assert all(theirs is None or torch.equal(own, theirs) for own, theirs in zip(ours, plain(x), strict=True))


def test_sigmoid_scores_in_the_output_are_not_taken_for_logits():
    assert make(SigmoidScores)[0].gate.contract.logits is None


@pytest.mark.parametrize("gate_class", [SigmoidScores, ChoosesByBiasAlone, MoEGate])
def test_logits_that_nobody_reads_are_not_computed_again(gate_class):
    """Training reads those of a router that does not return them, and decoding does not."""
    model = move_graphs(make(gate_class)).eval()
    with LinearSpy(EXPERTS) as spy:
        model(torch.randn(9, HIDDEN))
    assert len(spy.outputs) == 1


@pytest.mark.parametrize("gate_class", [ChoosesByBias, ChoosesByBiasAlone])
def test_a_bias_that_only_chooses_stays_as_it_is_and_can_be_moved(gate_class):
    """Whatever its name."""
    model = move_graphs(make(gate_class, balance="bias"))
    assert model[0].gate.contract.correction_bias == "bias"
    assert list(folded_parameters(model)) == ["0.gate.weight"]


def test_a_bias_in_the_product_is_smoothed_and_folded():
    model = move_graphs(make(BiasInTheProduct)).eval()
    gate, x = model[0].gate, torch.randn(9, HIDDEN)
    wanted = F.linear(x, gate.weight, gate.bias) @ transition(gate).T
    torch.testing.assert_close(gate(x)[0], wanted, rtol=1e-4, atol=1e-5)  # float32 rounding of sums
    folded = folded_parameters(model)
    got = F.linear(x, folded["0.gate.weight"], folded["0.gate.bias"])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate_class", [WeighsByBias, WeighsBySoftmaxOfChosen])
def test_a_bias_that_weighs_too_is_no_correction_bias(gate_class):
    with pytest.raises(ConfigError, match="without a correction bias"):
        make(gate_class, balance="bias")


def test_a_bias_that_may_be_a_part_of_logits_that_are_not_returned_is_refused():
    with pytest.raises(UnsupportedModelError, match="`bias` is not in the product"):
        make(BiasAfterTheProduct)


def test_a_head_that_does_not_run_on_logits_alone_has_no_scores_to_smooth():
    make(OfOneWidth)
    with pytest.raises(UnsupportedModelError, match="its head cannot be run on logits alone"):
        make(OfOneWidth, smoothing="scores")


@pytest.mark.parametrize("top_k", [2, 3])
def test_a_number_of_choices_that_the_user_gives_does_not_replace_the_choices(top_k):
    """DeepSeek-V3 chooses in groups and with a bias: other experts than those of the highest logits."""
    with quiet():
        model = tiny_model("deepseek_v3")
    if top_k == 2:
        named, found = find_gates(model, ("*.mlp.gate",), top_k), find_routers(model)
        assert [router.contract for router in named] == [router.contract for router in found]
        assert found[0].contract.indices is not None
    else:
        with pytest.raises(UnsupportedModelError, match="returns 2 chosen experts per token, got `top_k=3`"):
            find_gates(model, ("*.mlp.gate",), top_k)


@pytest.mark.parametrize("around", ["hook", "lora"])
def test_a_map_whose_weight_is_read_is_smoothed_whatever_is_around_it(around):
    """LongCat's router reads the weight of its `classifier`, so that a hook or LoRA on it has no effect."""
    with quiet():
        model = move_graphs(symphonize(tiny_model("longcat_flash"))).eval()
    ids = torch.randint(3, VOCAB, (2, 9))
    wanted = model(ids).logits
    if around == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["classifier"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    else:
        for router in find_routers(model):
            router.module.classifier.register_forward_hook(lambda *call: None)
    assert torch.equal(model(ids).logits, wanted)


class Asserting(LinearGateBlock):
    """Asserts the shape that it takes, as home-made code does."""

    def forward(self, hidden_states):
        assert hidden_states.ndim == 3, "expected (batch, time, channels)"
        return super().forward(hidden_states)


class NeverRuns(LinearGateBlock):
    def forward(self, hidden_states):
        raise AssertionError("expected something else")


def test_a_block_that_asserts_its_inputs_shape_is_run_with_the_other():
    model = symphonize(nn.Sequential(Asserting(), Asserting()), routers="*.gate").train()
    add_router_losses(model, model(torch.randn(2, 5, HIDDEN)).square().mean()).backward()
    assert update_graphs(model)
    with pytest.raises(UnsupportedModelError, match="expected something else"):
        symphonize(nn.Sequential(NeverRuns()), routers="*.gate")
