"""`balance_scope="step"`: each micro-batch is balanced by the load of the optimizer step's micro-batches so far."""

import copy

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


def naive_step(batches, family="olmoe"):
    """Gradients and mean balance loss of a step of the stock model in float64, with naive loads."""
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
            load = (chosen[layer] / num_tokens).clone()
            balance += len(load) * (load * logits.softmax(-1).mean(0)).sum() / len(layers)
            z += logits.logsumexp(-1).square().mean() / len(layers)
        values.append(float(balance.detach()))
        loss = out.loss + WEIGHTS["balance_loss_weight"] * balance + WEIGHTS["z_loss_weight"] * z
        (loss / len(batches)).backward()
    return {name: gradient.float() for name, gradient in gradients(model).items()}, sum(values) / len(values)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])
def test_gradients_and_logged_loss_are_those_of_the_load_so_far(family, checkpointing):
    batches = batches_of(3)
    expected, balance = naive_step(batches, family)
    model = symphonized(family, checkpointing)
    backward(model, batches)
    assert_gradients(gradients(model), expected)
    update_graphs(model)
    assert tracker_of(model).state.take_losses()["balance_loss"] == pytest.approx(balance, rel=1e-5)


def test_a_step_of_one_micro_batch_is_balanced_locally():
    steps = {}
    for scope in ("local", "step"):
        model = symphonized(balance_scope=scope)
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
