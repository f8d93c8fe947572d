"""The router's gradient from experts that were not chosen, against plain loops over tokens and experts."""

import copy

import pytest
import torch
from models import make_ids, make_model, move_graphs
from transformers import AutoModelForCausalLM, DeepseekV3Config

from symphony_hf import (
    ConfigError,
    UnsupportedModelError,
    is_symphonized,
    quantize_experts,
    symphonize,
    unsymphonize,
)
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.routing.gradient import all_others

QUIET = {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}  # the gradient of the main loss alone
HOW = [("dense", 0), ("neighbours", 2), ("random", 2)]


def make_deepseek(**overrides):
    """Sigmoid scores, two groups of which a token gets one, a bias on choices, a factor on weights."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        **overrides,
    }
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**settings), experts_implementation="eager")
    with torch.no_grad():
        for _, module in model.named_modules():
            if hasattr(module, "e_score_correction_bias"):
                module.weight.normal_(std=0.5)
                module.e_score_correction_bias.uniform_(0, 0.1)
    return model.eval()


ROUTERS = {
    "softmax, renormalized": (lambda: make_model("mixtral", experts="eager"), "exp", True, 1.0),
    "softmax, as it is": (lambda: make_model("olmoe", experts="eager"), "exp", False, 1.0),
    "softmax, renormalized by a setting": (
        lambda: make_model("olmoe", experts="eager", norm_topk_prob=True),
        "exp",
        True,
        1.0,
    ),
    "sigmoid, groups, renormalized": (make_deepseek, "sigmoid", True, 2.5),
    "sigmoid, groups, as it is": (lambda: make_deepseek(norm_topk_prob=False), "sigmoid", False, 2.5),
}


def blocks_of(model):
    return [module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]


def expert_output(experts, index, x):
    """One expert's output on one token."""
    gate, up = (experts.gate_up_proj[index] @ x).chunk(2)
    return experts.down_proj[index] @ (torch.nn.functional.silu(gate) * up)


def naive_others(how, number, chosen, adjacency, drawn):
    num_experts = len(adjacency)
    rest = [e for e in range(num_experts) if e not in chosen]
    if how == "dense":
        return rest
    if how == "random":
        return drawn
    share = {e: sum(adjacency[i][e] / sum(adjacency[i]) for i in chosen) for e in rest}
    return sorted(rest, key=lambda e: -share[e])[:number]


def naive_gradient(block, x_TD, upstream_TD, chosen, others, score, renormalized, factor, matrix):
    """Gradients of the router's weight and of the input, token by token, by a straight-through term in plain sight."""
    weight = block.gate.weight.detach().clone().requires_grad_()
    x_TD = x_TD.detach().clone().requires_grad_()
    total = 0.0
    for t in range(len(x_TD)):
        g = matrix @ (weight @ x_TD[t])
        s = g.exp() if score == "exp" else g.sigmoid()
        S, N = chosen[t], others[t]
        if renormalized:
            mass = sum(s[i] for i in S + N)
            v = {i: s[i] / mass for i in S + N}
            scale = 1.0 / sum(v[i] for i in S).item()
        else:
            mass = s.sum() if score == "exp" else 1.0
            v = {i: s[i] / mass for i in S + N}
            scale = 1.0
        y = 0.0
        for i in S:  # the stock weights, for the experts and what comes below them
            y = y + factor * scale * v[i].detach() * expert_output(block.experts, i, x_TD[t])
        for i in S + N:
            term = factor * scale * v[i] * expert_output(block.experts, i, x_TD[t]).detach()
            y = y + term - term.detach()
        total = total + (upstream_TD[t] * y).sum()
    experts = list(block.experts.parameters())
    return torch.autograd.grad(total, [weight, x_TD, *experts])


@pytest.mark.parametrize(("how", "number"), HOW)
@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_are_the_naive_loops(name, how, number):
    make, score, renormalized, factor = ROUTERS[name]
    model = move_graphs(symphonize(make(), router_gradient=how, strength=0.4, **QUIET)).double().train()
    block = blocks_of(model)[1]
    torch.manual_seed(1)
    x_TD = torch.randn(7, 32, dtype=torch.float64).requires_grad_()
    upstream_TD = torch.randn(7, 32, dtype=torch.float64)
    others_TN = []
    noted = block.gate.gradient_of_others._others
    block.gate.gradient_of_others._others = lambda *args: others_TN.append(noted(*args)) or others_TN[-1]
    _, _, chosen_TK = block.gate(x_TD)
    chosen = chosen_TK.tolist()
    others_TN.clear()
    if hasattr(block, "shared_experts"):
        block.shared_experts.down_proj.weight.data.zero_()
    output = block(x_TD[None])[0]
    (output * upstream_TD).sum().backward()
    adjacency = block.gate.symphony.adjacency.double().tolist()
    drawn = others_TN[0].tolist()
    others = [naive_others(how, number, chosen[t], adjacency, drawn[t]) for t in range(7)]
    assert [sorted(row) for row in drawn] == [sorted(row) for row in others]
    matrix = block.gate.symphony.transition().double()
    expected = naive_gradient(block, x_TD, upstream_TD, chosen, others, score, renormalized, factor, matrix)
    actual = [block.gate.weight.grad, x_TD.grad, *(p.grad for p in block.experts.parameters())]
    for ours, naive in zip(actual, expected, strict=True):
        # Families make their weights in float32.
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6 * float(naive.abs().max()))


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad()
    output = model(ids, labels=ids, **inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("experts", "how"), [("eager", "dense"), ("grouped_mm", "neighbours"), ("batched_mm", "random")]
)
def test_the_forward_is_the_stock_one_bit_for_bit(family, experts, how):
    stock = move_graphs(symphonize(make_model(family, experts=experts), **QUIET)).train()
    ours = move_graphs(symphonize(make_model(family, experts=experts), router_gradient=how, **QUIET)).train()
    ids = make_ids()
    expected, plain = loss_and_gradients(stock, ids)
    actual, gradients = loss_and_gradients(ours, ids)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)
    assert not torch.allclose(gradients["model.layers.1.mlp.gate.weight"], plain["model.layers.1.mlp.gate.weight"])
    # The last layer's experts have what the stock model gives them: only logits get more.
    last = "model.layers.2.mlp.experts.down_proj"
    torch.testing.assert_close(gradients[last], plain[last])


@pytest.mark.parametrize("how", ["dense", "neighbours", "random"])
def test_a_copy_trains_on_its_own_and_unsymphonize_restores(how):
    model = move_graphs(symphonize(make_model("olmoe"), router_gradient=how, **QUIET)).train()
    ids, twin = make_ids(), copy.deepcopy(model)
    names = [(router.gradient_of_others.block, router.gradient_of_others.name) for _, router in symphony_routers(twin)]
    assert all(block is twin.get_submodule(name.rpartition(".")[0]) for block, name in names)
    _, expected = loss_and_gradients(model, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, gradients = loss_and_gradients(twin, ids)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    unsymphonize(model)
    assert not any("gradient_of_others" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("olmoe", {"router_gradient": "neighbors"}, "`router_gradient` is 'neighbors'.*neighbours"),
        ("olmoe", {"router_gradient": "neighbours", "num_neighbours": 6}, "`num_neighbours` is 6.*8 experts.*most 5"),
        ("olmoe", {"router_gradient": "random", "num_neighbours": 6}, "`num_neighbours` is 6.*at most 5"),
        ("olmoe", {"num_neighbours": 0}, "`num_neighbours` must be a number from 1 on, got 0"),
        ("olmoe", {"router_gradient": "neighbours", "graph": "frozen"}, "no expert has a neighbour.*never learned"),
        ("olmoe", {"router_gradient": "neighbours", "decay": 1}, "no expert has a neighbour.*graph=PATH"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_changed(family, settings, message):
    model = make_model(family)
    with pytest.raises(ConfigError, match=message):
        symphonize(model, **settings)
    assert not is_symphonized(model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("dbrx", "its block makes the weights"),
        ("phimoe", "neither a softmax nor a sigmoid"),
        ("switch_transformers", "does not return the chosen experts with a weight for each"),
    ],
)
def test_families_of_another_form_are_refused_with_the_reason(model_type, reason):
    model = tiny_model(model_type)
    with pytest.raises(UnsupportedModelError, match=rf"router_gradient='dense' is not defined for it: .*{reason}"):
        symphonize(model, router_gradient="dense")
    assert not is_symphonized(model)


@pytest.mark.parametrize("router_gradient", ["dense", "neighbours"])
def test_a_model_that_chooses_all_experts_has_no_others(router_gradient):
    model = make_model("mixtral", num_experts_per_tok=4, num_local_experts=4)
    with pytest.raises(ConfigError, match="nothing to add: a token chooses all 4 experts"):
        symphonize(model, router_gradient=router_gradient)
    assert not is_symphonized(model)


def test_a_block_that_changes_the_weights_is_refused_when_it_runs():
    model = symphonize(make_model("olmoe"), router_gradient="dense").train()
    block = model.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda module, args: (*args[:2], args[2] * 2))
    with pytest.raises(UnsupportedModelError, match=r"`model\.layers\.0\.mlp\.gate`.*changes the router's choices"):
        model(make_ids(), labels=make_ids())


def test_experts_that_zero_3_partitions_are_refused_when_they_run():
    """Two ranks waited for each other's gather until the time limit: the check saw it with DeepSpeed."""
    model = symphonize(make_model(), router_gradient="dense").train()
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.ds_id = 0  # as DeepSpeed marks a parameter
    with pytest.raises(UnsupportedModelError, match="ZeRO-3 cannot gather"):
        model(make_ids())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("how", ["dense", "neighbours"])
@pytest.mark.filterwarnings("ignore")  # of checkpointing
def test_gradients_are_the_same_under_checkpointing_and_accumulation(how, use_reentrant):
    model = move_graphs(symphonize(make_model("olmoe"), router_gradient=how, **QUIET)).train()
    ids = make_ids(4)
    _, expected = loss_and_gradients(model, ids)
    model.zero_grad()
    for half in ids.split(2):
        (model(half, labels=half).loss / 2).backward()
    halves = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    _, recomputed = loss_and_gradients(model, ids)
    assert halves.keys() == recomputed.keys() == expected.keys()
    for name, gradient in expected.items():
        for other in (halves[name], recomputed[name]):
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()), msg=name)


def test_a_second_backward_gives_the_same():
    model = symphonize(make_model("olmoe"), router_gradient="dense", **QUIET).train()
    ids = make_ids()
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = model.model.layers[0].mlp.gate.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.gate.weight.grad, 2 * once)


@pytest.mark.thorough
def test_torch_compile_fullgraph_gives_the_same():
    """For `dense`, which takes other experts alone, only their choice is compiled."""
    torch._dynamo.reset()
    chosen = torch.tensor([[0, 3], [1, 2]])
    compiled = torch.compile(all_others, fullgraph=True, backend="aot_eager")
    assert compiled(chosen, 4).tolist() == all_others(chosen, 4).tolist() == [[1, 2], [0, 3]]
    eager = make_model("mixtral", experts="batched_mm", num_hidden_layers=1)
    eager = move_graphs(symphonize(eager, router_gradient="neighbours")).train()
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    ids = make_ids()
    for model in (eager, compiled):
        model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(eager.named_parameters(), compiled_model.parameters(), strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_draws_what_it_would_without_it():
    """Other experts run in the backward pass: the next forward's random numbers are the stock ones."""
    losses = []
    for how in ("chosen", "random", "dense"):
        model = symphonize(make_model("olmoe", attention_dropout=0.5), router_gradient=how, **QUIET).train()
        torch.manual_seed(3)
        ids = make_ids()
        model(ids, labels=ids).loss.backward()
        losses.append(model(ids, labels=ids).loss.item())
    assert losses[1:] == losses[:1] * 2


def test_a_saved_model_goes_on_with_its_setting(tmp_path):
    model = move_graphs(symphonize(make_model("olmoe"), router_gradient="neighbours", num_neighbours=3, **QUIET))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm").train()
    assert loaded.model.layers[0].mlp.gate.symphony.config.num_neighbours == 3
    ids = make_ids()
    _, expected = loss_and_gradients(model.train(), ids)
    _, gradients = loss_and_gradients(loaded, ids)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_lora_of_experts_and_router_takes_part():
    """The others run with the adapter's experts, and the adapter's router gets their gradient."""
    peft = pytest.importorskip("peft")
    model = move_graphs(symphonize(make_model("mixtral"), router_gradient="dense", **QUIET))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=names, modules_to_save=["gate"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).train()
    ids = make_ids()
    adapted(ids, labels=ids).loss.backward()
    router = adapted.base_model.model.model.layers[1].mlp.gate
    gradient = router.modules_to_save["default"].weight.grad
    merged = adapted.merge_and_unload().train()
    assert not isinstance(merged.model.layers[1].mlp.experts, peft.tuners.lora.ParamWrapper)
    _, expected = loss_and_gradients(merged.requires_grad_(True), ids)
    wanted = expected["model.layers.1.mlp.gate.weight"]
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("experts", "use_reentrant"), [("eager", None), ("grouped_mm", True), ("batched_mm", False)])
@pytest.mark.filterwarnings("ignore")  # of checkpointing
def test_experts_in_4_bits_are_unpacked_for_it(experts, use_reentrant):
    """Bit for bit the gradient of a model whose weights are what the packed ones say."""
    pytest.importorskip("bitsandbytes")
    # Rows of 64 values, as bitsandbytes packs them on a CPU.
    model = make_model("mixtral", experts=experts, hidden_size=64, intermediate_size=64, head_dim=16)
    model = move_graphs(symphonize(model, router_gradient="neighbours", **QUIET)).train()
    packed = quantize_experts(copy.deepcopy(model))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 3:
                block, _, leaf = name.rpartition(".")
                weight.copy_(getattr(packed.get_submodule(block), leaf))
    if use_reentrant is not None:
        packed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        packed.enable_input_require_grads()
    ids = make_ids()
    _, expected = loss_and_gradients(model, ids)
    _, gradients = loss_and_gradients(packed, ids)
    routers = [name for name in gradients if name.endswith("gate.weight")]
    assert len(routers) == len(model.model.layers)
    for name in routers:
        assert torch.equal(gradients[name], expected[name]), name
