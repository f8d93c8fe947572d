"""Gates that are not of transformers: named by the user, or found beside their experts."""

import contextlib

import pytest
import torch
from gates import (
    EXPERTS,
    HIDDEN,
    VOCAB,
    HomeMadeModel,
    LinearGateBlock,
    ModelOfArgmaxGates,
    ModelOfBiasedGates,
    ModelOfTopKGates,
    PlainModel,
    make_home_made,
)
from models import assert_folded, make_model, move_graphs
from models import make_ids as text_ids
from torch import nn
from transformers import AutoModelForCausalLM

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyWarning,
    UnsupportedModelError,
    add_router_losses,
    expert_graphs,
    export_folded,
    fold,
    symphonize,
    unsymphonize,
    update_graphs,
)

DECAY = 0.5
CASES = {
    "found": (HomeMadeModel, {}),
    "named": (HomeMadeModel, {"routers": "layers.*.moe.gate"}),
    "argmax": (ModelOfArgmaxGates, {"routers": ["*.gate"], "top_k": 2}),
    "TopKGate": (ModelOfTopKGates, {"routers": "*.moe.gate", "top_k": 2}),
    "no transformers": (PlainModel, {"routers": "*.gate"}),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def make_ids(seed=0):
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids):
    output = model(ids)
    return getattr(output, "logits", output)


def gates_of(model):
    """The gates, and where their last choice is kept, by the name that symphonize gives the gate."""
    for number, layer in enumerate(model.layers):
        block = layer["moe"]
        if isinstance(model, ModelOfTopKGates):
            yield f"layers.{number}.moe.gate", block.gate, block.gate.wg
        else:
            yield f"layers.{number}.moe.gate", block, block.gate


def naive_mix(adjacency, weight):
    """A @ W by loops, row-stochastic A."""
    rows = []
    for row in adjacency.double():
        rows.append(sum(a / row.sum() * w.double() for a, w in zip(row, weight, strict=True)))
    return torch.stack(rows).to(weight.dtype)


def test_the_start_and_any_graph(case):
    model_class, settings = case
    model, ids = make_home_made(model_class), make_ids()
    base = logits_of(model, ids)
    symphonize(model, **settings)
    assert torch.equal(logits_of(model, ids), base)
    move_graphs(model)
    ours = logits_of(model, ids)
    assert not torch.allclose(ours, base)
    reference = make_home_made(model_class)
    for (name, _, linear), adjacency in zip(gates_of(reference), expert_graphs(model).values(), strict=True):
        assert name in expert_graphs(model)
        linear.weight.data = naive_mix(adjacency, linear.weight.data)
    # Float32 rounding of A W, in a product of a few tens of terms.
    torch.testing.assert_close(ours, logits_of(reference, ids), rtol=1e-4, atol=1e-5)
    folded = fold(model)
    assert_folded(logits_of(folded, ids), ours)
    assert list(folded.state_dict()) == list(reference.state_dict())


def test_the_graph_is_the_count_of_what_the_blocks_chose(case):
    model_class, settings = case
    model, ids = symphonize(make_home_made(model_class), decay=DECAY, **settings).train(), make_ids()
    before = expert_graphs(model)
    loss = logits_of(model, ids).logsumexp(-1).mean()
    add_router_losses(model, loss).backward()
    assert update_graphs(model)
    for name, holder, linear in gates_of(model):
        pairs = torch.zeros(EXPERTS, EXPERTS)
        for chosen in holder.last_choice.tolist():
            for j in chosen:
                for k in chosen:
                    pairs[j, k] += 1
        expected = DECAY * before[name] + (1 - DECAY) * pairs / len(holder.last_choice)
        torch.testing.assert_close(expert_graphs(model)[name], expected, rtol=0, atol=1e-6)
        assert linear.weight.grad.abs().sum() > 0


def test_the_losses_reach_the_gates(case):
    """The difference that the weights make in a gate's gradient is the gradient of the naive losses."""
    model_class, settings = case
    gradients = []
    for weight in (0.0, 0.3):
        model = make_home_made(model_class).train()
        symphonize(model, balance_loss_weight=weight, z_loss_weight=weight, **settings)
        inputs = []
        model.layers[-1]["moe"].register_forward_pre_hook(lambda module, args, kept=inputs: kept.append(args[0]))
        add_router_losses(model, logits_of(model, make_ids()).square().mean()).backward()
        _, holder, linear = list(gates_of(model))[-1]
        gradients.append(linear.weight.grad)
    weight = linear.weight.detach().clone().requires_grad_()
    logits = inputs[0].detach().reshape(-1, HIDDEN) @ weight.T
    share = torch.zeros_like(logits).scatter(1, holder.last_choice, 1.0).mean(0)
    balance = EXPERTS * (share * logits.softmax(-1).mean(0)).sum()
    naive = 0.3 / 3 * (balance + logits.logsumexp(-1).square().mean())  # averaged over three layers
    expected = torch.autograd.grad(naive, weight)[0]
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-3, atol=1e-6)


def test_the_loss_that_a_model_computes_itself_is_recorded():
    model, ids = symphonize(make_home_made()).train(), make_ids()
    model(ids, labels=ids).loss.backward()
    assert update_graphs(model)  # a SymphonyWarning says where the losses were lost
    plain = symphonize(make_home_made(), balance_loss_weight=0.0, z_loss_weight=0.0).train()
    plain(ids, labels=ids).loss.backward()
    ours, theirs = (next(gates_of(m))[2].weight.grad for m in (model, plain))
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("name", ["found", "named", "argmax", "TopKGate"])
def test_save_load_and_folded_export(name, tmp_path):
    model_class, settings = CASES[name]
    model, ids = move_graphs(symphonize(make_home_made(model_class), **settings)), make_ids()
    model.save_pretrained(tmp_path / "ours")
    loaded, info = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, adjacency in expert_graphs(model).items():
        assert torch.equal(expert_graphs(loaded)[name], adjacency)
    # A checkpoint's tensors may be aligned otherwise in memory, which orders sums otherwise.
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=1e-5, atol=1e-6)
    export_folded(model, tmp_path / "folded")
    folded = model_class.from_pretrained(tmp_path / "folded")
    assert list(folded.state_dict()) == list(make_home_made(model_class).state_dict())
    assert_folded(logits_of(folded, ids), logits_of(model, ids))


def test_a_model_without_transformers_keeps_its_graph_in_its_state_dict():
    model, ids = move_graphs(symphonize(PlainModel().eval(), routers="*.gate")), make_ids()
    twin = symphonize(make_home_made(PlainModel, seed=1), routers="*.gate")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(twin, ids), logits_of(model, ids))
    unsymphonize(twin)
    assert list(twin.state_dict()) == list(PlainModel().state_dict())
    assert type(twin.layers[0]["moe"].gate) is torch.nn.Linear
    with pytest.raises(PatchError, match="expected a transformers model"):
        export_folded(model, "nowhere")


@pytest.mark.parametrize(
    ("model_class", "settings", "message"),
    [
        (HomeMadeModel, {"routers": "*.gates"}, r"matches no module; .*layers\.\*\.moe\.gate"),
        (HomeMadeModel, {"routers": "embed"}, "Embedding `embed`"),
        (HomeMadeModel, {"routers": "*.gate", "top_k": 7}, "chooses 7 of 6 experts"),
        (HomeMadeModel, {"routers": "*.gate", "layers": [5]}, "layer 5"),
        (HomeMadeModel, {"routers": "*.gate", "smoothing": "scores"}, "its block makes the weights"),
        (ModelOfBiasedGates, {}, "does not choose by the highest logits .* `top_k="),
        (ModelOfBiasedGates, {"routers": "*.gate"}, "does not choose by the highest logits"),
        (ModelOfArgmaxGates, {}, "makes no top-k over the experts.* `top_k="),
        (ModelOfTopKGates, {"routers": "*.wg", "top_k": 2}, "reads its weight itself: give .* the block's name"),
        (ModelOfTopKGates, {"routers": "*.gate"}, "which experts were chosen"),
    ],
)
def test_what_cannot_be_seen_is_refused(model_class, settings, message):
    model = make_home_made(model_class)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=message):
        symphonize(model, **settings)
    assert [type(module) for module in model.modules()] == classes


def test_bad_settings_are_refused():
    model = make_home_made()
    for settings, message in (
        ({"top_k": 2}, "`top_k` needs `routers`"),
        ({"routers": "*.gate", "top_k": 0}, "from 1 on"),
        ({"routers": []}, "patterns of module names"),
        ({"routers": [3]}, "patterns of module names"),
    ):
        with pytest.raises(ConfigError, match=message):
            symphonize(model, **settings)
    with pytest.raises(PatchError, match="for a model of your own give `routers=`"):
        symphonize(PlainModel())


def test_a_gate_that_is_gone_past_while_training_is_warned_about():
    """What no look beforehand can see: the block changes its ways."""
    model, ids = symphonize(make_home_made(), routers="*.gate").train(), make_ids()
    block = model.layers[1]["moe"]
    block.forward = lambda hidden: hidden + torch.nn.functional.linear(hidden, block.gate.weight).sum(-1, keepdim=True)
    for watched in (False, True):
        model(ids, labels=ids).loss.backward()
        with pytest.warns(SymphonyWarning, match="1 of 3 routers") if watched else contextlib.nullcontext():
            update_graphs(model)


class Variant(LinearGateBlock):
    """A block that chooses in a way of its own; `choose` gives weights and indices, (tokens, K) each."""

    def choose(self, logits):
        raise NotImplementedError

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, HIDDEN)
        weights, self.last_choice = self.choose(self.gate(flat))
        outputs = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, self.last_choice.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (weights.unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


class StatisticFirst(Variant):
    def choose(self, logits):
        self.confidence = logits.softmax(-1).topk(1).values.mean()
        return logits.softmax(-1).topk(2)


class Preselecting(Variant):
    def choose(self, logits):
        candidates = logits.topk(4).indices
        scores = logits.flip(-1).softmax(-1).gather(1, candidates)  # by another order than the logits'
        weights, places = scores.topk(2)
        return weights, candidates.gather(1, places)


class Lowest(Variant):
    def choose(self, logits):
        return logits.softmax(-1).topk(2, largest=False)


class ExpertChoice(Variant):
    def choose(self, logits):
        logits.topk(4, dim=0)
        return logits.softmax(-1)[:, :2], torch.arange(2).expand(len(logits), 2)


class NoisyInTraining(Variant):
    def choose(self, logits):
        if self.training:
            logits = logits + 3 * torch.randn_like(logits)
        return logits.softmax(-1).topk(2)


class MoreInTraining(Variant):
    def choose(self, logits):
        return logits.softmax(-1).topk(3 if self.training else 2)


@pytest.mark.parametrize(
    "block",
    [StatisticFirst, Preselecting, Lowest, ExpertChoice, NoisyInTraining, MoreInTraining],
    ids=lambda b: b.__name__,
)
def test_other_ways_of_choosing_are_refused(block):
    model = nn.Sequential(block())
    with pytest.raises(UnsupportedModelError, match="does not choose by the highest logits"):
        symphonize(model, routers="*.gate")


def test_noise_in_training_is_taken_on_the_users_word_and_a_wrong_number_is_not():
    symphonize(nn.Sequential(NoisyInTraining()), routers="*.gate", top_k=2)
    for block in (Lowest(), LinearGateBlock(3)):
        with pytest.raises(UnsupportedModelError, match=r"highest logits of its gate .* and not 2"):
            symphonize(nn.Sequential(block), routers="*.gate", top_k=2)


def test_blocks_may_choose_different_numbers():
    model = nn.Sequential(LinearGateBlock(2), LinearGateBlock(3))
    symphonize(model, routers="*.gate")
    assert [model[place].gate.contract.top_k for place in (0, 1)] == [2, 3]


class Router(nn.Module):
    """A router of its own weight or of linear maps inside it, whose `logits` are its own affair."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.first = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.last = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x):
        logits = self.logits(x)
        return logits, *logits.softmax(-1).topk(self.top_k)


class NoiseBeside(Router):
    def logits(self, x):
        self.last(x)  # for the spread of a noise that is only added in training
        return self.first(x)


class SumOfTwo(Router):
    def logits(self, x):
        return self.first(x) + self.last(x)


class WeightAndMap(Router):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def logits(self, x):
        return torch.nn.functional.linear(x, self.weight) + self.last(x)


class TwoKindsOfIndices(Router):
    def logits(self, x):
        return self.last(x)

    def forward(self, x):
        logits, weights, indices = super().forward(x)
        return logits, weights, indices // 3, indices


class ScaledByExpert(Router):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(EXPERTS))

    def logits(self, x):
        return self.last(x) * self.scale


@pytest.mark.parametrize(
    "router", [NoiseBeside, SumOfTwo, WeightAndMap, TwoKindsOfIndices, ScaledByExpert], ids=lambda r: r.__name__
)
@pytest.mark.parametrize("top_k", [None, 2])
def test_routers_that_more_than_one_map_decides_are_refused(router, top_k):
    """A graph on one of the maps would change nothing, or half."""
    model = nn.ModuleDict({"router": router()})
    with pytest.raises(UnsupportedModelError, match="`router`: "):
        symphonize(model, routers="router", top_k=top_k)


def test_a_gate_in_several_layers_is_refused():
    block = LinearGateBlock()
    with pytest.raises(UnsupportedModelError, match="shares its weight"):
        symphonize(nn.ModuleList([nn.ModuleDict({"moe": block}), nn.ModuleDict({"moe": block})]), routers="*.gate")


def test_a_layer_that_is_gone_through_twice_counts_twice():
    class Looped(PlainModel):
        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            self.choices = []
            for _ in range(2):
                hidden = hidden + self.layers[0]["moe"](hidden)
                self.choices += self.layers[0]["moe"].last_choice.tolist()
            return self.head(hidden)

    model = symphonize(Looped(), routers="layers.0.*.gate", decay=DECAY).train()
    add_router_losses(model, model(make_ids()).square().mean()).backward()
    update_graphs(model)
    pairs = torch.zeros(EXPERTS, EXPERTS)
    for chosen in model.choices:
        for j in chosen:
            for k in chosen:
                pairs[j, k] += 1
    expected = DECAY * torch.eye(EXPERTS) * 2 / EXPERTS + (1 - DECAY) * pairs / len(model.choices)
    torch.testing.assert_close(expert_graphs(model)["layers.0.moe.gate"], expected, rtol=0, atol=1e-6)


def test_routers_named_in_full_are_found_again_in_the_models_inside(tmp_path):
    model, ids = symphonize(make_model(), routers="model.layers.[02].mlp.gate"), text_ids()
    move_graphs(model).save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, type(model.model).from_pretrained):
        loaded = load(tmp_path)
        graphs = {name.removeprefix("model."): graph for name, graph in expert_graphs(loaded).items()}
        assert list(graphs) == ["layers.0.mlp.gate", "layers.2.mlp.gate"]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_wrappers_are_refused():
    for wrapped in (nn.Sequential(make_model()), torch.compile(make_model())):
        with pytest.raises(PatchError, match="symphonize that, `"):
            symphonize(wrapped, routers="*.gate")


def test_lora_around_a_gate_that_is_a_linear_map_is_refused():
    peft = pytest.importorskip("peft")
    model, ids = symphonize(make_home_made()), make_ids()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["gate"])).train()
    with pytest.raises(PatchError, match=r"`gate` of LinearGateBlock was replaced by Linear .*modules_to_save"):
        adapted(ids, labels=ids)
    whole = symphonize(make_home_made())
    adapted = peft.get_peft_model(whole, peft.LoraConfig(target_modules=["head"], modules_to_save=["gate"])).train()
    adapted(ids, labels=ids).loss.backward()
    assert update_graphs(adapted)


def test_nobodys_random_numbers_are_touched(monkeypatch):
    """Accelerators' generators neither; here no one has any, so that a call is all there is to see."""

    def fail(seed):
        raise AssertionError("seeded")

    model = make_home_made()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    before = torch.random.get_rng_state()
    symphonize(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_hidden_states_may_come_by_name():
    gate = symphonize(make_home_made(), routers="*.gate").layers[0]["moe"].gate
    hidden = torch.randn(2, 3, HIDDEN)
    assert torch.equal(gate(input=hidden), gate(hidden))
