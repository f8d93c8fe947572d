"""The balance and z-loss reach the router once, with their weight, in every loop. Held against plain autograd."""

import copy

import pytest
import torch
from models import gradients, llava_inputs, make_ids, make_llava, make_model
from naive_losses import WEIGHTS, assert_gradients, naive_router_losses, reference_gradients
from trainers import train

from symphony_hf import (
    SymphonyCallback,
    SymphonyWarning,
    add_router_losses,
    symphonize,
    unsymphonize,
    upcycle_modules,
    update_graphs,
)
from symphony_hf.experiments.conformance.batches import tiny_batch
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.symphonize import symphony_routers


def batches_of(count, *, different=True, padded=False):
    batches = []
    for step in range(count):
        ids = make_ids(2, 8, seed=step if different else 0)
        batch = {"input_ids": ids, "labels": ids}
        if padded:
            mask = torch.ones_like(ids)
            mask[0, 5:] = 0
            batch["attention_mask"] = mask
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        batches.append(batch)
    return batches


def base(family):
    return make_model(family, router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("checkpointing", "padded"),
    [(None, False), (True, True), (False, True)],
    ids=["off", "reentrant, padded", "non-reentrant, padded"],
)
def test_a_plain_loop_with_accumulation(family, checkpointing, padded):
    batches = batches_of(4, padded=padded)
    expected = reference_gradients(base(family), batches)
    model = symphonize(base(family), **WEIGHTS).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    update_graphs(model)
    for inputs in batches:
        (model(**inputs).loss / len(batches)).backward()
    assert_gradients(gradients(model), expected)


@pytest.mark.parametrize("count", [1, 4, 8])
def test_identical_micro_batches_give_the_gradient_of_one(count):
    one = symphonize(base("mixtral"), **WEIGHTS).train()
    batch = batches_of(1)[0]
    one(**batch).loss.backward()
    many = symphonize(base("mixtral"), **WEIGHTS).train()
    update_graphs(many)
    for _ in range(count):
        (many(**batch).loss / count).backward()
    for name, gradient in gradients(one).items():
        # 1, 4 and 8 are powers of two: division and repeated sums of equal terms are exact in binary up to the order
        # of additions, 1 ulp.
        torch.testing.assert_close(gradients(many)[name], gradient, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(("accumulation", "use_reentrant"), [(1, None), (4, True), (8, False)])
def test_trainer_applies_the_weights_whatever_the_accumulation(tmp_path, accumulation, use_reentrant):
    """Trainer passes `num_items_in_batch` and then does not divide by the accumulation steps."""
    rows = make_ids(2 * accumulation, 8)
    model = symphonize(base("olmoe"), **WEIGHTS)
    seen, batches = {}, []  # Trainer shuffles: which rows made a micro-batch is seen as the model is called
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append({name: kwargs[name].clone() for name in ("input_ids", "labels")}),
        with_kwargs=True,
    )

    class Spy(SymphonyCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update(gradients(model))

    settings = {"gradient_checkpointing": use_reentrant is not None}
    if use_reentrant is not None:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
    train(
        model,
        rows,
        tmp_path,
        [Spy()],
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        **settings,
    )
    assert len(batches) == accumulation
    assert_gradients(seen, reference_gradients(base("olmoe"), batches))


def test_a_loss_scaler_scales_the_router_losses_alike():
    batches = batches_of(1)
    expected = reference_gradients(base("mixtral"), batches)
    model = symphonize(base("mixtral"), **WEIGHTS).train()
    (model(**batches[0]).loss * 2.0**16).backward()
    assert_gradients(gradients(model), expected, scale=2.0**-16)


def test_micro_batches_of_different_size_weigh_as_their_tokens_do():
    """With `num_items_in_batch`, each token of the step counts the same, as in their cross-entropy."""
    long, short = make_ids(2, 13), make_ids(2, 5, seed=1)
    num_items = 2 * 12 + 2 * 4
    plain = base("olmoe")
    for ids, items in ((long, 24), (short, 8)):
        out = plain(input_ids=ids, labels=ids, output_router_logits=True)
        balance, z = naive_router_losses(out.router_logits, 3)
        (
            (out.loss + WEIGHTS["balance_loss_weight"] * balance + WEIGHTS["z_loss_weight"] * z) * items / num_items
        ).backward()
    model = symphonize(base("olmoe"), **WEIGHTS).train()
    update_graphs(model)
    for ids in (long, short):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(num_items)).loss.backward()
    assert_gradients(gradients(model), gradients(plain))


@pytest.mark.thorough
@pytest.mark.parametrize("encoder_decoder", ["nllb-moe", "switch_transformers"])
def test_a_forward_that_averages_its_loss_itself_ignores_num_items_in_batch(encoder_decoder):
    """Over an accumulated step: the router losses keep their weight beside a loss that is not divided."""
    found = []
    for num_items in ({}, {"num_items_in_batch": torch.tensor(40)}):
        with quiet():
            torch.manual_seed(0)
            model = symphonize(tiny_model(encoder_decoder), **WEIGHTS).train()
        update_graphs(model)
        for seed in range(2):
            batch = tiny_batch(model, seed=seed)
            batch["labels"][0, : 3 + seed] = -100
            torch.manual_seed(seed)  # the same dropout
            model(**batch, **num_items).loss.backward()
        found.append(gradients(model))
    assert_gradients(found[1], found[0])


@pytest.mark.parametrize(("family", "number"), [("nllb-moe", 2), ("switch_transformers", 4)])
def test_losses_that_a_loop_might_add_are_0_in_training(family, number):
    """Those of an encoder and of a decoder. In evaluation they are as the model computes them."""
    with quiet():
        model = tiny_model(family)
    batch = {**tiny_batch(model), "output_router_logits": True}
    try:
        model(**batch)
    except ValueError:  # Switch, in 5.17
        pytest.skip("this version of transformers cannot return the family's router logits")
    with quiet():
        symphonize(model)
    for training in (True, False):
        out = model.train(training)(**batch)
        losses = {name: value for name, value in out.items() if name.endswith(("aux_loss", "z_loss"))}
        assert len(losses) == number
        assert all(value == 0 for value in losses.values()) is training


def test_a_loop_that_computes_its_own_loss():
    ids = make_ids()
    expected = reference_gradients(base("mixtral"), [{"input_ids": ids, "labels": ids}])
    model = symphonize(base("mixtral"), **WEIGHTS).train()
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    add_router_losses(model, loss).backward()
    assert_gradients(gradients(model), expected)


def test_a_loop_that_forgets_the_router_losses_is_told_once():
    model, ids = symphonize(make_model()).train(), make_ids()
    model(ids).logits.sum().backward()
    with pytest.warns(SymphonyWarning, match="add_router_losses") as caught:
        update_graphs(model)
        model(ids).logits.sum().backward()
        update_graphs(model)
    assert len(caught) == 1
    silent = symphonize(make_model(), balance_loss_weight=0, z_loss_weight=0).train()
    silent(ids).logits.sum().backward()
    assert update_graphs(silent)


def test_an_old_factor_is_not_used_again():
    """A step with a loss of the loop's own must not start the router losses with the factor of the step before."""
    model, ids = symphonize(base("mixtral"), **WEIGHTS).train(), make_ids()
    update_graphs(model)
    model(ids, labels=ids).loss.backward()
    update_graphs(model)
    model.zero_grad()
    (model(ids, labels=ids).logits.sum() * 0).backward()  # with labels, but not with the loss that they gave
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(model).values())
    with pytest.warns(SymphonyWarning, match="add_router_losses"):
        update_graphs(model)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_llava_gets_the_losses_that_transformers_leaves_out(use_reentrant):
    inputs = llava_inputs()
    inputs["attention_mask"][1, 8:] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = make_llava()
    seen = []
    for module in plain.modules():
        if type(module).__name__ == "OlmoeTopKRouter":
            module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    loss = plain(**inputs, labels=labels).loss
    balance, z = naive_router_losses(seen, 3, inputs["attention_mask"])
    (loss + WEIGHTS["balance_loss_weight"] * balance + WEIGHTS["z_loss_weight"] * z).backward()
    model = symphonize(make_llava(), **WEIGHTS).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    model(**inputs, labels=labels).loss.backward()
    expected, actual = gradients(plain), gradients(model)
    # Reentrant checkpointing gives the vision tower no gradient, in transformers as in here: compare what both have.
    language = [name for name in expected if "language_model" in name]
    assert len(language) > 10
    assert_gradients({n: actual[n] for n in language}, {n: expected[n] for n in language})


def test_logged_values_are_the_means():
    model = symphonize(make_model(), **WEIGHTS).train()
    update_graphs(model)
    expected = []
    for inputs in batches_of(3, padded=True):
        with torch.no_grad():
            logits = model.eval()(**inputs, output_router_logits=True).router_logits
        expected.append(naive_router_losses(logits, 3, inputs["attention_mask"]))
        model.train()(**inputs).loss.backward()
    update_graphs(model)
    values = model._symphony_tracker.state.take_losses()
    assert values["balance_loss"] == pytest.approx(float(sum(b for b, _ in expected)) / 3, rel=1e-5)
    assert values["z_loss"] == pytest.approx(float(sum(z for _, z in expected)) / 3, rel=1e-5)
    assert model._symphony_tracker.state.take_losses() == {}


@pytest.mark.parametrize("text_alone", [(True,), (False, True, True), (True, False)])
def test_logged_values_leave_out_forwards_that_a_router_had_none_of(text_alone):
    """The projector's router, the first of the model, sees only images."""
    model = symphonize(upcycle_modules(make_llava(), "*multi_modal_projector"), **WEIGHTS).train()
    routers, seen = dict(symphony_routers(model)), {}
    for name, router in routers.items():
        router.logit_notes = (lambda logits, name=name: seen.setdefault(name, []).append(logits.detach()),)
    for seed, alone in enumerate(text_alone):
        ids = make_ids(seed=seed)
        inputs = {"input_ids": ids} if alone else llava_inputs(seed=seed)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        update_graphs(model)
    expected = []
    for name, logits in seen.items():
        values = [naive_router_losses([each], routers[name].contract.top_k) for each in logits]
        expected.append([float(sum(losses)) / len(values) for losses in zip(*values, strict=True)])
    assert len(expected) == (3 if all(text_alone) else 4)
    values = model._symphony_tracker.state.take_losses()
    for name, of_routers in zip(("balance_loss", "z_loss"), zip(*expected, strict=True), strict=True):
        assert values[name] == pytest.approx(sum(of_routers) / len(expected), rel=1e-5)


def test_logged_values_follow_the_model_to_another_device():
    """A device that adds nothing to another's tensors, as GPUs do not: `meta`, which every machine has."""
    state = tracker_of(symphonize(make_model())).state
    for device in ("cpu", "meta"):
        state.log_losses([torch.zeros(3, 3, device=device)])
    assert state.logged_losses.device.type == "meta"


def test_nothing_is_logged_where_no_router_ran():
    model, ids = symphonize(make_model(), **WEIGHTS).train(), make_ids()
    model.model.layers = torch.nn.ModuleList()
    with pytest.warns(SymphonyWarning, match="no Symphony router is left in OlmoeModel"):
        model(ids, labels=ids).loss.backward()
    update_graphs(model)
    assert model._symphony_tracker.state.take_losses() == {}


def test_the_returned_loss_is_the_cross_entropy_alone():
    """Perplexities and loss curves of symphonized and plain models thus mean the same."""
    ids = make_ids()
    plain = base("olmoe")(ids, labels=ids).loss
    model = symphonize(base("olmoe"), **WEIGHTS).train()
    assert torch.equal(model(ids, labels=ids).loss, plain)


def own_loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """The cross-entropy, divided as Trainer wants it."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def set_before(model):
    model.loss_function = own_loss
    return symphonize(model, **WEIGHTS)


def set_after(model):
    symphonize(model, **WEIGHTS).loss_function = own_loss
    return model


def set_around(model):
    """A function that calls the one that was there."""
    former = symphonize(model, **WEIGHTS).loss_function
    model.loss_function = lambda *args, **kwargs: former(*args, **kwargs)
    return model


@pytest.mark.parametrize("set_loss", [set_before, set_after, set_around])
@pytest.mark.parametrize("count", [1, 4])
def test_a_loss_function_of_the_users_shares_the_step_as_the_models_own(set_loss, count):
    batches = batches_of(count)
    num_items = torch.tensor(count * 2 * 7)
    found = []
    for make in (lambda model: symphonize(model, **WEIGHTS), set_loss):
        model = make(base("olmoe")).train()
        update_graphs(model)
        for inputs in batches:
            model(**inputs, num_items_in_batch=num_items).loss.backward()
        found.append(gradients(model))
    assert_gradients(found[1], found[0])


def test_a_loss_function_that_was_set_later_is_back_after_unsymphonize():
    model = set_after(base("olmoe")).train()
    ids = make_ids()
    model(ids, labels=ids)
    assert unsymphonize(model).loss_function is own_loss


def test_a_loss_function_that_was_set_for_a_while_is_gone_after_unsymphonize():
    model = symphonize(base("olmoe")).train()
    before, ids = model.loss_function, make_ids()
    for function in (own_loss, before):
        model.loss_function = function
        model(ids, labels=ids)
    assert unsymphonize(model).loss_function is base("olmoe").loss_function


def test_labels_of_an_encoder_decoder_are_all_in_the_share():
    """As Trainer counts them: the first of each row too."""
    with quiet():
        model = symphonize(tiny_model("nllb-moe"))
    assert model.loss_type == "ForConditionalGeneration"
    labels, num_items = torch.tensor([[5, 6, -100]]), torch.tensor(4)
    assert model.loss_function._share_of_step(None, labels, num_items_in_batch=num_items) == 2 / 4


@pytest.mark.parametrize("begins", ["a step", "a callback"])
def test_losses_that_a_loop_might_add_are_0_in_its_evaluations(begins):
    """TRL's trainers add them there, too. A model that nobody trains shows its own."""
    model, ids = symphonize(make_model()), make_ids()
    aux_loss = lambda: model.eval()(ids, output_router_logits=True).aux_loss  # noqa: E731
    assert aux_loss() > 0
    if begins == "a step":
        model.train()(ids, labels=ids).loss.backward()
        assert aux_loss() > 0
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    else:
        tracker_of(model).state.begin_training()  # as SymphonyCallback does
    assert aux_loss() == 0
    assert copy.deepcopy(model).eval()(ids, output_router_logits=True).aux_loss > 0  # a reference, which nobody trains
    unsymphonize(model)
    assert aux_loss() > 0
