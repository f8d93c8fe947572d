"""The counting rule of patching/training_state.py: a test for each clause, and more situations of each kind."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from models import make_ids, make_model, move_graphs
from torch import nn
from torch.func import functional_call, grad, vmap

from symphony_hf import (
    PatchError,
    SymphonyWarning,
    add_router_losses,
    expert_graphs,
    fold,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.symphonize import symphony_routers
from symphony_hf.routing.losses import load_balancing_loss, z_loss

GATE = "model.layers.0.mlp.gate"


def model_of(family="olmoe", **settings):
    return symphonize(make_model(family), **{"decay": 0.5, **settings}).train()


def forward(model, seed=0, **inputs):
    ids = make_ids(seed=seed)
    return model(ids, labels=ids, **inputs).loss


def step(model, *seeds):
    for seed in seeds:
        forward(model, seed).backward()
    return update_graphs(model)


def assert_same_graphs(a, b):
    graphs, others = expert_graphs(a), expert_graphs(b)
    assert graphs.keys() == others.keys()
    assert all(torch.equal(graph, others[name]) for name, graph in graphs.items())


def assert_same_gradients(a, b):
    for (name, parameter), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


# The clauses. Clause 2, padding and recomputation (4), and compiled forwards (6) have tests in test_tracking.py and
# test_patching.py too.


def test_clause_1_only_training_forwards_make_a_record():
    model, alone = model_of(), model_of()
    step(alone, 0)
    forward(model).backward()
    with torch.no_grad():
        forward(model, 1)
    model.eval()
    forward(model, 2)
    model.train()
    update_graphs(model)
    assert_same_graphs(model, alone)


@pytest.mark.parametrize("top_k", [3, 6])
def test_clause_3_the_number_of_chosen_experts_is_the_one_in_force(top_k):
    """Qwen3-MoE's router reads it at every forward."""

    def change(model):
        for layer in model.model.layers:
            layer.mlp.gate.top_k = top_k
        return model

    before = symphonize(change(make_model("qwen3_moe")), decay=0.0, strength=0.5).train()
    after = change(symphonize(make_model("qwen3_moe"), decay=0.0, strength=0.5)).train()
    for model in (before, after):
        step(model, 0)
    assert_same_graphs(before, after)
    assert expert_graphs(after)[GATE].diagonal().sum() == pytest.approx(top_k)
    for (name, parameter), other in zip(before.named_parameters(), after.parameters(), strict=True):
        # The graphs start at another K / E, whose transition is the identity either way: another rounding.
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


class ChoosingBlock(nn.Module):
    """A block whose gate is a plain linear layer: the block decides how many experts are chosen."""

    def __init__(self):
        super().__init__()
        self.gate, self.top_k = nn.Linear(16, 4, bias=False), 2
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        index = chosen.unsqueeze(-1).expand(*chosen.shape, 16)
        return (weights.unsqueeze(-1) * outputs.gather(-2, index)).sum(-2)


def test_clause_3_a_change_that_cannot_be_followed_is_refused():
    model = symphonize(nn.Sequential(ChoosingBlock()), routers="*.gate", top_k=2).train()
    model(torch.randn(5, 16))
    model[0].top_k = 3
    with pytest.raises(PatchError, match=r"ChoosingBlock.top_k is 3 and was 2"):
        model(torch.randn(5, 16))


def test_clause_3_dropped_layers_are_as_if_dropped_before():
    def drop(model):
        model.model.layers = nn.ModuleList(model.model.layers[:1])
        model.config.num_hidden_layers = 1
        return model

    before, after = symphonize(drop(make_model()), decay=0.5).train(), drop(model_of())
    for model in (before, after):
        step(model, 0)
    assert_same_graphs(before, after)
    assert_same_gradients(before, after)


def test_clause_3_reordered_layers_keep_their_graphs():
    model = model_of()
    graphs = [layer.mlp.gate.symphony for layer in model.model.layers]
    step(model, 0)
    model.model.layers = nn.ModuleList([model.model.layers[place] for place in (2, 0, 1)])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    twin = copy.deepcopy(model)
    before = expert_graphs(model)
    step(model, 1)
    step(twin, 1)
    assert_same_graphs(model, twin)
    assert not torch.equal(expert_graphs(model)[GATE], before[GATE])
    assert [layer.mlp.gate.symphony for layer in model.model.layers] == [graphs[place] for place in (2, 0, 1)]


def test_clause_3_a_copied_layer_has_a_record_and_a_graph_of_its_own():
    """In depth up-scaling, a layer is copied behind the others, and then sees other hidden states."""
    model = model_of()
    step(model, 0)
    copied = copy.deepcopy(model.model.layers[0])
    copied.self_attn.layer_idx = 3
    model.model.layers.append(copied)
    model.config.num_hidden_layers = 4
    seen = {}
    for name, router in symphony_routers(model):
        router.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out[2].detach().clone()}))
    before = expert_graphs(model)
    step(model, 1)
    graphs = expert_graphs(model)
    assert len(graphs) == 4
    for name, chosen in seen.items():
        selected = torch.zeros(len(chosen), 8).scatter(1, chosen, 1.0)
        expected = 0.5 * before[name] + 0.5 * (selected.T @ selected) / len(chosen)
        torch.testing.assert_close(graphs[name], expected, rtol=1e-6, atol=1e-7)  # a product rounds in another order
    assert not torch.equal(graphs[GATE], graphs["model.layers.3.mlp.gate"])


def test_clause_3_a_stock_layer_that_is_put_in_later_is_named():
    stock = make_model(seed=1).model.layers[1].train()
    model = model_of()
    model.model.layers.append(stock)
    with pytest.warns(SymphonyWarning, match="put in after `symphonize`"):
        forward(model)
    model = model_of()
    model.model.layers[1] = stock
    with pytest.raises(
        PatchError, match=r"`layers\.1\.mlp\.gate` .* was replaced .*`1` of ModuleList is a OlmoeDecoder"
    ):
        forward(model)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_clause_5_a_forward_whose_backward_never_comes_leaves_no_trace(checkpointing):
    """A loop skips a batch whose loss is not finite, while the last loss is still referenced."""
    model, alone = model_of(), model_of()
    for each in (model, alone):
        if checkpointing is not None:
            each.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            each.enable_input_require_grads()
    loss = forward(model, 7, attention_mask=torch.ones_like(make_ids()).tril(5))
    assert not update_graphs(model)
    for seed in (0, 1):
        loss = forward(model, seed)
        loss.backward()
    step(alone, 0, 1)
    update_graphs(model)
    assert_same_graphs(model, alone)


def test_clause_5_a_forward_or_backward_that_is_broken_off_leaves_no_trace():
    model, alone = model_of(), model_of()

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        forward(model, 5)
    hook.remove()
    loss = forward(model, 6)
    hook = model.model.layers[0].mlp.gate.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss.backward()
    hook.remove()
    model.zero_grad()
    step(model, 0)
    step(alone, 0)
    assert_same_graphs(model, alone)


def test_clause_5_a_parameter_in_the_output_tells_no_backward():
    """As a trained prompt, which `output_hidden_states` returns: all forwards have it in common."""
    model, alone = model_of(), model_of()
    for each, seeds in ((model, (7, 0)), (alone, (0,))):
        prompt = torch.nn.Parameter(each.get_input_embeddings()(make_ids()).detach())
        for seed in seeds:
            ids = make_ids(seed=seed)
            loss = each(inputs_embeds=prompt, labels=ids, output_hidden_states=True).loss
        loss.backward()
        assert not prompt._backward_hooks
        update_graphs(each)
    assert_same_graphs(model, alone)


@dataclass
class Output:
    hidden: torch.Tensor


class OfAnyOutput(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.block, self.output = ChoosingBlock(), output

    def forward(self, x):
        return self.output(hidden=self.block(x))


@pytest.mark.parametrize("output", [SimpleNamespace, Output])
def test_clause_5_holds_for_any_output(output):
    model, ids = symphonize(OfAnyOutput(output), routers="*.gate").train(), torch.randn(6, 16)
    model(ids)
    assert not update_graphs(model)
    with pytest.warns(SymphonyWarning, match="computes its own loss"):
        model(ids).hidden.sum().backward()
        assert update_graphs(model)


def test_clause_5_a_second_backward_does_not_count_again():
    model, alone = model_of(), model_of()
    loss = forward(model)
    loss.backward(retain_graph=True)
    loss.backward()
    update_graphs(model)
    step(alone, 0)
    assert_same_graphs(model, alone)


def test_clause_6_where_no_gradient_reaches_the_stack_its_forward_counts():
    """The trunk is frozen below a trained head."""
    model, alone = model_of(), model_of()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    forward(model).backward()
    with pytest.warns(SymphonyWarning, match="every router is frozen"):
        assert update_graphs(model)
    step(alone, 0)
    assert_same_graphs(model, alone)


def test_clause_8_another_models_optimizer_moves_nothing():
    """An actor accumulates beside a critic that steps at every batch."""
    actor, critic, alone = model_of(), model_of(), model_of()
    optimizers = {each: torch.optim.SGD(each.parameters(), lr=0.1) for each in (actor, critic, alone)}
    for seed in range(3):
        for each in (actor, critic, alone):
            forward(each, seed).backward()
        optimizers[critic].step()
        update_graphs(critic)
    for each in (actor, alone):
        assert all(int(router.symphony.updates) == 0 for _, router in symphony_routers(each))
        optimizers[each].step()
        update_graphs(each)
        assert all(int(router.symphony.updates) == 1 for _, router in symphony_routers(each))
    assert_same_graphs(actor, alone)


def test_clause_8_a_stock_models_optimizer_moves_nothing_once_the_own_one_is_known():
    model, stock = model_of(), make_model(seed=1).train()
    own, other = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, stock))
    forward(model).backward()
    own.step()
    update_graphs(model)
    forward(model, 1).backward()
    forward(stock, 1).backward()
    other.step()
    forward(model, 2).backward()  # would commit a step of its own, and warn
    assert all(int(router.symphony.updates) == 1 for _, router in symphony_routers(model))


def test_clause_9_loading_a_state_dict_drops_what_is_pending():
    """A step is rolled back after its backward, and once more between its forward and its backward."""
    model, alone = model_of(), model_of()
    saved = copy.deepcopy(model.state_dict())
    forward(model, 5).backward()
    model.load_state_dict(saved)
    assert not update_graphs(model)
    loss = forward(model, 6)
    inner = {name.removeprefix("model."): value for name, value in saved.items() if not name.startswith("lm_head")}
    model.model.load_state_dict(inner, assign=True)  # torch refuses a backward through weights written in place
    loss.backward()
    assert not update_graphs(model)
    model.zero_grad()
    step(model, 0)
    step(alone, 0)
    assert_same_graphs(model, alone)


# No zero is divided by.


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_a_step_without_a_label_has_finite_gradients(num_items):
    """Trainer passes the number of labels of the step: the stock model survives one that has none."""
    model, ids = model_of(), make_ids()
    model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=num_items).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    update_graphs(model)
    assert all(torch.isfinite(graph).all() for graph in expert_graphs(model).values())


def test_a_batch_of_padding_alone_leaves_graphs_and_router_gradients_finite():
    model, ids = model_of(), make_ids()
    before = expert_graphs(model)
    model(ids, attention_mask=torch.zeros_like(ids), labels=ids).loss.backward()
    update_graphs(model)
    assert all(torch.equal(before[name], graph) for name, graph in expert_graphs(model).items())
    gates = [p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")]
    assert all(torch.isfinite(gradient).all() for gradient in gates)


def test_a_router_without_any_token_has_finite_losses():
    for number in range(2):
        logits = torch.zeros(0, 4, requires_grad=True)
        loss = z_loss(logits) if number else load_balancing_loss(logits, torch.zeros(0, 2, dtype=torch.long))
        assert loss.item() == 0
        loss.backward()
        assert torch.isfinite(logits.grad).all()


# Equal tensors give equal logits.


@pytest.mark.parametrize("write", ["data", "set_", "numpy", "swap"])
def test_a_write_that_bumps_no_version_has_effect(write):
    model, ids = move_graphs(model_of()).eval(), make_ids()
    model(ids)
    for _, router in symphony_routers(model):
        graph, new = router.symphony, torch.rand(8, 8)
        new = new + new.T
        if write == "data":
            graph.adjacency.data.copy_(new)
        elif write == "set_":
            graph.adjacency.data = new
        elif write == "numpy":
            graph.adjacency.numpy()[:] = new.numpy()
        else:
            torch.utils.swap_tensors(graph.adjacency, new)
    fresh = symphonize(make_model())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, fresh.eval()(ids).logits)


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_state_dict_is_the_live_storage(graph):
    settings = {"graph": graph, "decay": 0.99}  # the default: a learned graph reads no other
    model, other = move_graphs(model_of(**settings)), move_graphs(model_of(**settings), seed=1)
    ids = make_ids()
    live = model.state_dict()
    assert live[f"{GATE}.symphony.adjacency"].data_ptr() == model.get_submodule(GATE).symphony.adjacency.data_ptr()
    with torch.no_grad():
        for name, value in other.state_dict().items():
            live[name].copy_(value)
    assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


# Other engines' transforms, and hooks.


@pytest.mark.parametrize("training", [False, True])
def test_torch_func_gives_the_gradient_of_the_returned_loss(training):
    model, stock, ids = move_graphs(model_of(strength=0.0)).train(training), make_model().train(training), make_ids()

    def gradients(each):
        parameters = {name: p.detach() for name, p in each.named_parameters()}
        loss = lambda p, x: functional_call(each, p, (), {"input_ids": x, "labels": x}).loss  # noqa: E731
        return grad(loss)(parameters, ids)

    expected = gradients(stock)
    for name, gradient in gradients(model).items():
        # strength 0: the stock model's numbers, but for the order of a sum.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_vmap_over_an_ensemble_of_routers():
    router = move_graphs(model_of()).eval().get_submodule(GATE)
    x = torch.randn(5, 32)
    weights = torch.stack([router.weight.detach(), 2 * router.weight.detach()])
    logits = vmap(lambda weight: functional_call(router, {"weight": weight}, (x,))[0])(weights)
    torch.testing.assert_close(logits[0], router(x)[0])  # a batched product sums in another order


def test_evaluation_leaves_no_function_of_ours_in_the_autograd_graph():
    def names(model):
        seen, nodes = set(), [forward(model).grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [parent for parent, _ in node.next_functions]
        return {type(node).__name__ for node in seen}

    ours = {"RecordGradientScaleBackward", "AttachLossBackward"}
    model = move_graphs(model_of())
    assert names(model) >= ours
    assert not names(model.eval()) & ours


@pytest.mark.parametrize(
    "order", ["offload symphonize remove", "symphonize offload remove", "offload remove symphonize"]
)
@pytest.mark.parametrize("end", [unsymphonize, fold])
def test_hooks_of_accelerate_come_and_go_in_any_order(order, end):
    model, ids = make_model(), make_ids()
    logits = model(ids).logits
    steps = {
        "offload": lambda: cpu_offload(model, torch.device("cpu")),
        "remove": lambda: remove_hook_from_submodules(model),
        "symphonize": lambda: symphonize(model),
    }
    for name in order.split():
        steps[name]()
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(end(model)(ids).logits, logits)


def test_a_float64_model_is_bit_exact_at_the_start():
    ids = make_ids()
    model = make_model(experts="eager").double()
    logits = model(ids).logits
    assert torch.equal(symphonize(model)(ids).logits, logits)


# Losses are logged where they are applied.


def test_losses_that_no_gradient_started_are_not_logged():
    model, ids = model_of(balance_loss_weight=0.5), make_ids()
    model(ids).logits.float().logsumexp(-1).mean().backward()
    with pytest.warns(SymphonyWarning, match="computes its own loss"):
        update_graphs(model)
    assert tracker_of(model).state.take_losses() == {}
    add_router_losses(model, model(ids).logits.float().logsumexp(-1).mean()).backward()
    update_graphs(model)
    assert set(tracker_of(model).state.take_losses()) == {"balance_loss", "z_loss"}


def test_clause_2_padding_is_left_out():
    model, ids = symphonize(make_model()).train(), make_ids()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    (pending,) = model._symphony_tracker.state.pending.values()
    assert pending.tokens_L.tolist() == [float(mask.sum())] * 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_clause_4_a_recomputed_layer_does_not_write_again(use_reentrant):
    model, ids = symphonize(make_model()).train(), make_ids()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    (pending,) = model._symphony_tracker.state.pending.values()
    assert pending.tokens_L.tolist() == [float(ids.numel())] * 3


def test_clause_7_what_counts_is_pending_until_an_optimizer_has_stepped():
    model, ids = symphonize(make_model()).train(), make_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for steps in (True, False, True):
        model(ids, labels=ids).loss.backward()
        if steps:
            optimizer.step()
        moved.append(update_graphs(model))
    assert moved == [True, False, True]
    assert not model._symphony_tracker.state.counted


def test_clause_7_before_an_optimizer_is_known_each_call_commits():
    """A loop may update parameters without an optimizer of torch."""
    model = model_of()
    assert [step(model, seed) for seed in range(3)] == [True] * 3


def test_clause_8_before_the_own_optimizer_is_known_one_with_neither_models_parameters_counts():
    """A sharded optimizer holds flat copies."""
    model = model_of()
    flat = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    forward(model).backward()
    flat.step()
    assert model._symphony_tracker.state.stepped


def test_clause_10_nothing_of_it_is_a_buffer():
    model, ids = symphonize(make_model()).train(), make_ids()
    before = {name for name, _ in model.named_buffers()}
    model(ids, labels=ids).loss.backward()
    assert {name for name, _ in model.named_buffers()} == before
