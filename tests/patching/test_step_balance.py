"""Balancing over the optimizer step: by the load of its micro-batches so far, or of the whole step before."""

import copy
import json

import pytest
import torch
from models import gradients, make_ids, make_model
from naive_losses import WEIGHTS, assert_gradients
from trainers import train as run_trainer

from symphony_hf import SymphonyCallback, symphonize, update_graphs
from symphony_hf.patching.attachment import tracker_of


def batches_of(count):
    """Micro-batches of different lengths, each with padding in one row."""
    batches = []
    for seed in range(count):
        ids = make_ids(2, 7 + 2 * seed, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def stock(family="olmoe", **settings):
    return make_model(family, router_aux_loss_coef=0.0, **settings)


def symphonized(family="olmoe", checkpointing=None, **settings):
    model = symphonize(stock(family), **{**WEIGHTS, "balance_scope": "step", "decay": 0.5, **settings}).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    update_graphs(model)
    return model


def backward(model, batches, divide_by=None):
    for inputs in batches:
        (model(**inputs).loss / (divide_by or len(batches))).backward()


def naive_step(batches, family="olmoe", loads=None):
    """Gradients, mean balance loss and loads of a step of the stock model in float64, by naive loads or those given."""
    model = stock(family, experts="eager").double()
    top_k = model.config.num_experts_per_tok
    chosen, num_tokens, values = None, 0, []
    for inputs in batches:
        out = model(**inputs, output_router_logits=True)
        keep = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else slice(None)
        layers = [logits[keep] for logits in out.router_logits]
        chosen = torch.zeros(len(layers), layers[0].shape[1]).double() if chosen is None else chosen
        num_tokens += len(layers[0])
        balance = z = 0
        for layer, logits in enumerate(layers):
            chosen[layer] += logits.topk(top_k).indices.flatten().bincount(minlength=logits.shape[1])
            load = (chosen[layer] / num_tokens).clone() if loads is None else loads[layer]
            balance += len(load) * (load * logits.softmax(-1).mean(0)).sum() / len(layers)
            z += logits.logsumexp(-1).square().mean() / len(layers)
        values.append(float(balance.detach()))
        loss = out.loss + WEIGHTS["balance_loss_weight"] * balance + WEIGHTS["z_loss_weight"] * z
        (loss / len(batches)).backward()
    found = {name: gradient.float() for name, gradient in gradients(model).items()}
    return found, sum(values) / len(values), chosen / num_tokens


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("mixtral", None), ("olmoe", True), ("qwen2_moe", False), ("qwen3_moe", None)],
    indirect=["family"],
)
def test_gradients_and_logged_loss_are_those_of_the_load_so_far(family, checkpointing):
    batches = batches_of(3)
    expected, balance, _ = naive_step(batches, family)
    model = symphonized(family, checkpointing)
    backward(model, batches)
    assert_gradients(gradients(model), expected)
    update_graphs(model)
    assert tracker_of(model).state.take_losses()["balance_loss"] == pytest.approx(balance, rel=1e-5)


def with_top_ks(*top_ks, **settings):
    """A model whose layers choose different numbers of experts, as HunYuan-MoE's may."""
    model = stock()
    for layer, top_k in zip(model.model.layers, top_ks, strict=True):
        layer.mlp.gate.top_k = top_k
    return symphonize(model, **{**WEIGHTS, "decay": 0.5, **settings}).train()


@pytest.mark.parametrize("top_ks", [(3, 3, 3), (1, 3, 2)])
def test_a_step_of_one_micro_batch_is_balanced_locally(top_ks):
    steps = {}
    for scope in ("local", "step"):
        model = with_top_ks(*top_ks, balance_scope=scope)
        for inputs in batches_of(3):
            model.zero_grad()
            backward(model, [inputs])
            update_graphs(model)
        steps[scope] = gradients(model)
    assert_gradients(steps["step"], steps["local"])


@pytest.mark.parametrize("commit", [True, False])
def test_an_optimizer_step_begins_anew(commit):
    """Where the loop does not move the graphs, the next forward does, before it is balanced."""
    first, *batches = batches_of(3)
    model = symphonized(strength=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, [first])
    optimizer.step()
    optimizer.zero_grad()
    if commit:
        update_graphs(model)
        backward(model, batches)
    else:
        with pytest.warns(match="nothing moved the graphs"):
            backward(model, batches)
    assert_gradients(gradients(model), naive_step(batches)[0])


def test_what_is_dropped_balances_nothing():
    """A forward without a backward, a second backward, an evaluation, and what a loaded state dict has voided."""
    other, *batches = batches_of(3)
    model = symphonized()
    saved = copy.deepcopy(model.state_dict())
    backward(model, [other])
    model.load_state_dict(saved)
    model.zero_grad()
    model(**other)
    model.eval()(**other)
    loss = model.train()(**batches[0]).loss / 2
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    backward(model, batches[1:], divide_by=2)
    assert_gradients(gradients(model), naive_step(batches)[0])


def test_logits_that_are_not_finite_spoil_no_later_micro_batch():
    """A loss scaler skips the step, so that its counts stay pending."""
    broken, *batches = batches_of(3)
    model = symphonized()
    gate = model.model.layers[0].mlp.gate
    hook = gate.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan,))
    backward(model, [broken])
    hook.remove()
    model.zero_grad()
    backward(model, batches)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_balances_its_optimizer_steps(tmp_path, accumulation):
    seen, batches = [], []
    model = symphonize(stock(), **WEIGHTS, balance_scope="step", strength=0.0)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append({name: kwargs[name].clone() for name in ("input_ids", "labels")}),
        with_kwargs=True,
    )

    class Spy(SymphonyCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(gradients(model))

    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 0.0}
    run_trainer(model, make_ids(4 * accumulation, 8), tmp_path, [Spy()], **settings)
    assert len(seen) == 2
    for step, found in enumerate(seen):
        assert_gradients(found, naive_step(batches[step * accumulation : (step + 1) * accumulation])[0])


# The whole step before.


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])
def test_each_step_is_balanced_by_the_load_of_the_last(checkpointing):
    first, second = batches_of(5)[:3], batches_of(5)[3:]
    model = symphonized(checkpointing=checkpointing, balance_scope="last_step", strength=0.0)
    num_experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    even = torch.full((model.config.num_hidden_layers, num_experts), top_k / num_experts).double()
    for batches, loads in ((first, even), (second, naive_step(first)[2])):
        model.zero_grad()
        backward(model, batches)
        expected, balance, _ = naive_step(batches, loads=loads)
        assert_gradients(gradients(model), expected)
        update_graphs(model)
        assert tracker_of(model).state.take_losses()["balance_loss"] == pytest.approx(balance, rel=1e-5)


def test_the_first_step_is_balanced_by_an_even_load_of_each_layers_number_of_experts():
    """By an even load, a layer's balance loss is the number of experts that its tokens choose."""
    model = with_top_ks(1, 3, 2, balance_scope="last_step")
    backward(model, batches_of(1))
    update_graphs(model)
    assert tracker_of(model).state.take_losses()["balance_loss"] == pytest.approx((1 + 3 + 2) / 3, rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_load_of_the_last_step_makes_the_split_into_micro_batches_irrelevant(parts):
    found = {}
    for number in (1, parts):
        model = symphonized(balance_scope="last_step", strength=0.0)
        for seed in (0, 1):
            model.zero_grad()
            backward(model, [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 9, seed=seed).chunk(number)])
            update_graphs(model)
        found[number] = gradients(model)
    assert_gradients(found[parts], found[1])


def test_the_load_of_the_last_step_belongs_to_the_weights_that_had_it():
    batches = batches_of(3)
    model = symphonized(balance_scope="last_step", strength=0.0)
    saved = copy.deepcopy(model.state_dict())
    for restore in (lambda: copy.deepcopy(model), lambda: model.load_state_dict(saved) and model):
        backward(model, batches[:1])
        update_graphs(model)
        restored = restore()
        restored.zero_grad()
        backward(restored, batches[1:])
        loads = naive_step(batches[:1])[2]
        even = torch.full_like(loads, model.config.num_experts_per_tok / model.config.num_experts)
        wanted = even if restored is model else loads
        assert_gradients(gradients(restored), naive_step(batches[1:], loads=wanted)[0])


@pytest.mark.thorough
def test_a_resumed_run_is_balanced_by_the_step_before_it(tmp_path):
    """And a new run of the same model is not."""
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-2}
    whole = symphonized(balance_scope="last_step")
    run_trainer(whole, make_ids(16, 8), tmp_path, [SymphonyCallback()], **settings)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert (
        len(state["stateful_callbacks"]["SymphonyCallback"]["attributes"]["last_loads"]["0"])
        == whole.config.num_hidden_layers
    )
    for resumed_from, same in ((str(tmp_path / "checkpoint-2"), True), (None, False)):
        model = symphonized(balance_scope="last_step")
        backward(model, batches_of(1))
        update_graphs(model)
        seen = []
        model.register_forward_hook(lambda *_, model=model, seen=seen: seen.append(loads_of(model)))
        run_trainer(model, make_ids(16, 8), tmp_path / "again", [SymphonyCallback()], resume=resumed_from, **settings)
        even = torch.full_like(seen[0], model.config.num_experts_per_tok / model.config.num_experts)
        assert torch.equal(seen[0], even) is not same
        equal = [torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True)]
        assert all(equal) is same


def loads_of(model):
    return next(iter(tracker_of(model).state.last_loads.values())).clone()
