"""Every training forward moves the graph once, and nothing else does, whatever the arrangement."""

import copy
import warnings

import pytest
import torch
from models import llava_inputs, make_ids, make_llava, make_model, move_graphs
from naive_graphs import DECAY, naive_update, spy_on_selections
from trainers import Rows, train
from transformers import TrainingArguments

from symphony_hf import (
    PatchError,
    SymphonyCallback,
    SymphonyWarning,
    add_router_losses,
    expert_graphs,
    export_folded,
    symphonize,
    update_graphs,
)
from symphony_hf.experiments.conformance.batches import tiny_batch
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.expert_graph import ExpertGraph
from symphony_hf.patching.symphonize import symphony_routers


def assert_moved(model, before, seen, masks):
    for name, adjacency in expert_graphs(model).items():
        # The product rounds differently in float32 than in Python's float64: an ulp or two.
        torch.testing.assert_close(adjacency, naive_update(before[name], seen[name], masks), rtol=1e-6, atol=1e-7)
        assert not torch.equal(adjacency, before[name])


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_an_update_is_the_formula(family, num_micro_batches):
    model = symphonize(make_model(family), decay=DECAY).train()
    before, seen = expert_graphs(model), spy_on_selections(model)
    update_graphs(model)
    for step in range(num_micro_batches):
        ids = make_ids(seed=step)
        model(ids, labels=ids).loss.backward()
    assert all(torch.equal(before[name], graph) for name, graph in expert_graphs(model).items())
    assert update_graphs(model)
    assert_moved(model, before, seen, [[1] * 24] * num_micro_batches)
    assert not update_graphs(model)


def test_padding_is_left_out(family):
    model, ids = symphonize(make_model(family), decay=DECAY).train(), make_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, :4] = 0, 0  # right and left
    before, seen = expert_graphs(model), spy_on_selections(model)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    update_graphs(model)
    assert_moved(model, before, seen, [mask.flatten().tolist()])


def test_a_mask_by_position_is_found():
    model, ids = symphonize(make_model().model, decay=DECAY).train(), make_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    before, seen = expert_graphs(model), spy_on_selections(model)
    model(ids, mask).last_hidden_state.sum().backward()
    with pytest.warns(SymphonyWarning, match="computes its own loss"):
        update_graphs(model)
    assert_moved(model, before, seen, [mask.flatten().tolist()])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once_and_changes_no_gradient(family, use_reentrant):
    plain = move_graphs(symphonize(make_model(family))).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        update_graphs(model)
        for step in range(2):
            ids = make_ids(seed=step)
            mask = torch.ones_like(ids)
            mask[0, 9:] = 0
            (model(ids, attention_mask=mask, labels=ids).loss / 2).backward()
        update_graphs(model)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name
    for p, q in zip(expert_graphs(plain).values(), expert_graphs(checkpointed).values(), strict=True):
        assert torch.equal(p, q)


def test_evaluation_and_no_grad_forwards_do_not_count():
    model, ids = symphonize(make_model()), make_ids()
    update_graphs(model)
    model(ids)  # eval, with gradient
    with torch.no_grad():
        model.eval()(ids)
        model.train()(ids)
    model.eval().generate(ids, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    assert not update_graphs(model)


def test_a_forward_without_gradient_between_forward_and_backward_disturbs_nothing():
    """Reference models and metrics run such forwards. The recomputation must still see its own batch's mask."""
    results = []
    for extra in (False, True):
        model = move_graphs(symphonize(make_model("mixtral"))).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        update_graphs(model)
        ids = make_ids()
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        loss = model(ids, attention_mask=mask, labels=ids).loss
        if extra:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # torch, of the no_grad
                model(make_ids(seed=5), attention_mask=torch.ones_like(ids))
        loss.backward()
        update_graphs(model)
        results.append((expert_graphs(model), {n: p.grad for n, p in model.named_parameters()}))
    for name, graph in results[0][0].items():
        assert torch.equal(graph, results[1][0][name])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_a_loop_that_moves_no_graph_has_it_moved_at_the_first_forward_after_a_step():
    model, ids = symphonize(make_model(), decay=DECAY).train(), make_ids()
    before, seen = expert_graphs(model), spy_on_selections(model)
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(before[name], graph) for name, graph in expert_graphs(model).items())
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    with pytest.warns(SymphonyWarning, match="update_graphs"):
        model(ids, labels=ids)
    first_only = {name: selections[:1] for name, selections in seen.items()}
    assert_moved(model, before, first_only, [[1] * 24])


def test_two_forwards_before_one_backward():
    """In a loop that calls nothing, the graph waits for the backward: a recomputation must not see it moved."""
    results = []
    for use_reentrant in (None, True, False):
        model = move_graphs(symphonize(make_model("mixtral"), decay=0.0)).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        first, second = make_ids(), make_ids(seed=1)
        (model(first, labels=first).loss + model(second, labels=second).loss).backward()
        before = expert_graphs(model)
        update_graphs(model)
        assert all(not torch.equal(before[name], graph) for name, graph in expert_graphs(model).items())
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(results[2][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_finds_the_padding_of_its_own_forward(use_reentrant):
    """After two forwards with different padding and one backward, all is as without checkpointing."""
    gradients, graphs = [], []
    for checkpointing in (False, True):
        model, ids = symphonize(make_model(), balance_loss_weight=1.0, decay=DECAY).train(), make_ids()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        masks = [torch.ones_like(ids), torch.ones_like(ids).tril(5)]
        sum(model(ids, attention_mask=mask, labels=ids).loss for mask in masks).backward()
        update_graphs(model)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        graphs.append(expert_graphs(model))
    assert all(torch.equal(graph, graphs[1][name]) for name, graph in graphs[0].items())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name
        )  # another order of sums


def test_routers_that_their_block_goes_past_are_named():
    model, ids = symphonize(make_model()).train(), make_ids()
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    update_graphs(model)
    model(ids, labels=ids).loss.backward()
    update_graphs(model)  # the block is watched from now on
    model(ids, labels=ids).loss.backward()
    with pytest.warns(SymphonyWarning, match="1 of 3 routers .*OlmoeSparseMoeBlock.* were"):
        update_graphs(model)


def test_the_mode_of_the_stack_decides_not_that_of_a_layer():
    """A layer in evaluation mode, as when its dropout is switched off, counts and has its share of the losses."""
    ids, found = make_ids(), []
    for frozen in (False, True):
        model = symphonize(make_model(), decay=DECAY, balance_loss_weight=1.0).train()
        if frozen:
            model.model.layers[1].eval()
        for _ in range(3):  # a block is watched from the first step on in which its router is idle
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            assert update_graphs(model)
        found.append((expert_graphs(model), model.model.layers[1].mlp.gate.weight.grad))
    assert all(torch.equal(graph, found[1][0][name]) for name, graph in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_routers_of_skipped_layers_are_idle_by_right():
    """Experts for images are idle in a batch of text, and so are layers that are dropped at random."""
    model, ids = symphonize(make_model()).train(), make_ids()
    model.model.layers[1].mlp = torch.nn.Identity()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        assert update_graphs(model)


def test_frozen_and_strength_zero_graphs():
    with pytest.warns(SymphonyWarning, match="never learned"):
        frozen = move_graphs(symphonize(make_model(), graph="frozen")).train()
    moving = symphonize(make_model(), strength=0.0).train()
    ids = make_ids()
    for model, moves in ((frozen, False), (moving, True)):
        before = expert_graphs(model)
        model(ids, labels=ids).loss.backward()
        update_graphs(model)
        assert all(torch.equal(before[name], graph) != moves for name, graph in expert_graphs(model).items())


def test_llava_counts_image_tokens_and_leaves_padding_out():
    model, inputs = symphonize(make_llava(), decay=DECAY).train(), llava_inputs()
    inputs["attention_mask"][0, 8:] = 0
    before, seen = expert_graphs(model), spy_on_selections(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    update_graphs(model)
    assert_moved(model, before, seen, [inputs["attention_mask"].flatten().tolist()])


def test_float32_counts_under_bf16_autocast():
    model, ids = symphonize(make_model("mixtral"), decay=DECAY).train(), make_ids(8, 80)  # counts over 256
    before, seen = expert_graphs(model), spy_on_selections(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    update_graphs(model)
    assert_moved(model, before, seen, [[1] * 640])


def test_non_finite_logits_leave_the_graph_and_are_named_once():
    model, ids = symphonize(make_model()).train(), make_ids()
    update_graphs(model)
    before = expert_graphs(model)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0, 0] = torch.nan
    model(ids, labels=ids).loss.backward()
    with pytest.warns(SymphonyWarning, match="not finite"):
        update_graphs(model)
    after = expert_graphs(model)
    names = list(before)
    assert not torch.equal(before[names[0]], after[names[0]])  # before the bad layer: finite
    assert torch.equal(before[names[1]], after[names[1]])
    assert torch.equal(before[names[2]], after[names[2]])
    assert [int(router.symphony.updates) for _, router in symphony_routers(model)] == [1, 0, 0]
    model(ids, labels=ids).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_graphs(model)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_step_that_the_loop_skips_leaves_no_trace_in_the_next(family):
    """Its forward had logits that are not finite, and no optimizer stepped, so its counts are pending."""
    graphs = []
    for is_skipped in (False, True):
        model = symphonize(make_model(family), decay=DECAY).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for bad in (False, True, False) if is_skipped else (False, False):
            ids = make_ids(seed=int(bad))
            if bad:
                weight = model.model.layers[0].mlp.gate.weight
                kept = weight.detach().clone()
                weight.data[0, 0] = torch.nan
            model(ids, labels=ids).loss.backward()
            if bad:
                weight.data.copy_(kept)
                optimizer.zero_grad()
                continue
            optimizer.step()
            if is_skipped and int(model.model.layers[0].mlp.gate.symphony.updates) == 1:
                with pytest.warns(SymphonyWarning, match="not finite"):
                    update_graphs(model)
            else:
                update_graphs(model)
        graphs.append(expert_graphs(model))
        assert [int(router.symphony.updates) for _, router in symphony_routers(model)] == [2, 2, 2]
    assert all(torch.equal(graph, graphs[1][name]) for name, graph in graphs[0].items())


def test_a_micro_batch_that_is_not_finite_leaves_the_others_of_its_step():
    graphs = []
    for seeds in ((0, 2), (0, 1, 2)):
        model = symphonize(make_model(), decay=DECAY).train()
        for seed in seeds:
            ids = make_ids(seed=seed)
            embeddings = model.model.embed_tokens(ids)
            if seed == 1:
                embeddings = torch.where(torch.arange(12).view(1, 12, 1) == 3, torch.nan, embeddings)
            model(inputs_embeds=embeddings, labels=ids).loss.backward()
        if seeds == (0, 2):
            update_graphs(model)
        else:
            with pytest.warns(SymphonyWarning, match="not finite"):
                update_graphs(model)
        graphs.append(expert_graphs(model))
    assert all(torch.equal(graph, graphs[1][name]) for name, graph in graphs[0].items())


def test_the_callback_refuses_a_plain_model(tmp_path):
    with pytest.raises(PatchError, match="not symphonized"):
        train(make_model(), make_ids(8), tmp_path, [SymphonyCallback()])


def test_the_callback_refuses_data_parallel(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments._n_gpu = 2
    with pytest.raises(PatchError, match="accelerate launch"):
        SymphonyCallback().on_train_begin(arguments, None, None, model=symphonize(make_model()))


def test_an_adapters_graph_moves_and_the_bases_does_not():
    peft = pytest.importorskip("peft")
    base, ids = symphonize(make_model(), decay=DECAY), make_ids()
    num_modules = sum(1 for _ in base.modules())
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["symphony"])
    model = peft.get_peft_model(base, config).train()
    # Each graph was copied, and nothing else with it.
    assert sum(isinstance(module, ExpertGraph) for module in model.modules()) == 6
    before, seen = expert_graphs(model), spy_on_selections(model)
    update_graphs(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert update_graphs(model)
    assert_moved(model, before, seen, [[1] * 24])
    with model.disable_adapter():
        for name, graph in expert_graphs(model).items():
            assert torch.equal(graph, before[name])
    merged = model.merge_and_unload()
    assert sum(1 for _ in merged.modules()) == num_modules
    assert all(not torch.equal(graph, torch.eye(8) * 3 / 8) for graph in expert_graphs(merged).values())


@pytest.mark.parametrize("saved", ["gate", "symphony"])
def test_counts_of_one_adapter_do_not_move_the_graphs_of_another(saved):
    """Another adapter is set between two micro-batches of a step."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved])
    model = peft.get_peft_model(symphonize(make_model(), decay=DECAY), config).train()
    model.add_adapter("second", config)
    ids, others = make_ids(), make_ids(seed=1)
    model(input_ids=ids, labels=ids).loss.backward()
    model.set_adapter("second")
    before, seen = expert_graphs(model), spy_on_selections(model)
    with pytest.warns(SymphonyWarning, match="another adapter was set"):
        model(input_ids=others, labels=others).loss.backward()
    assert update_graphs(model)
    assert_moved(model, before, seen, [[1] * 24])


@pytest.mark.parametrize("saved", ["gate", "symphony"])
def test_peft_may_copy_a_whole_router(saved):
    peft = pytest.importorskip("peft")
    weights = {"balance_loss_weight": 5.0} if saved == "gate" else {"balance_loss_weight": 0.0, "z_loss_weight": 0.0}
    base, ids = symphonize(make_model(), decay=DECAY, **weights), make_ids()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved])).train()
    assert sum(isinstance(module, type(base.model.embed_tokens)) for module in model.modules()) == 1
    before, seen = expert_graphs(model), {}
    update_graphs(model)
    model(input_ids=ids, labels=ids).loss.backward()
    update_graphs(model)
    after = expert_graphs(model)
    assert len(after) == 3
    assert all(not torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    if saved == "gate":
        plain = symphonize(make_model(), decay=DECAY, balance_loss_weight=5.0).train()
        plain(input_ids=ids, labels=ids).loss.backward()
        expected = [p.grad for n, p in plain.named_parameters() if n.endswith("mlp.gate.weight")]
        seen = [p.grad for n, p in model.named_parameters() if n.endswith("modules_to_save.default.weight")]
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_copying_one_router_does_not_copy_the_model():
    router = symphonize(make_model()).model.layers[0].mlp.gate
    twin = copy.deepcopy(router)
    assert twin.stack is router.stack
    hidden = torch.randn(3, 32)
    assert torch.equal(twin.eval()(hidden)[0], router.eval()(hidden)[0])


def test_a_copy_of_an_encoder_and_a_decoder_has_graphs_of_its_own():
    """The copy of the encoder's counter reaches the decoder's before the decoder is copied."""
    with quiet():
        model = symphonize(tiny_model("nllb-moe"), decay=DECAY)
    before, twin = expert_graphs(model), copy.deepcopy(model).train()
    twin(**tiny_batch(twin)).loss.backward()
    assert update_graphs(twin)
    for name, graph in expert_graphs(twin).items():
        assert torch.equal(expert_graphs(model)[name], before[name])
        assert not torch.equal(graph, before[name])


def test_evaluations_during_training_take_no_values_from_the_log(tmp_path):
    model = symphonize(make_model())
    rows = make_ids(32, 8)
    trainer = train(
        model,
        rows,
        tmp_path,
        [SymphonyCallback()],
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=Rows(rows[:4]),
    )
    for entry in trainer.state.log_history:
        assert ("symphony/balance_loss" in entry) == ("loss" in entry)


def test_resuming_through_trainer_is_the_uninterrupted_run(tmp_path):
    """Trainer itself loses the experts of converted families on resume; our checkpoints are saved to avoid it."""
    rows = make_ids(32, 8)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    model, resumed = (symphonize(make_model("mixtral", seed=seed), warmup_steps=5) for seed in (0, 9))
    train(model, rows, tmp_path, [SymphonyCallback()], **settings)
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer = train(resumed, rows, tmp_path / "again", [SymphonyCallback()], resume=checkpoint, **settings)
    assert trainer.state.global_step == 6
    again = resumed.state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_trainer_without_the_callback_still_moves_the_graph(tmp_path):
    model = symphonize(make_model())
    before = expert_graphs(model)
    with pytest.warns(SymphonyWarning, match="SymphonyCallback"):
        train(model, make_ids(16), tmp_path)
    assert all(not torch.equal(before[name], graph) for name, graph in expert_graphs(model).items())


READERS = {
    "expert_graphs": lambda model, folder: expert_graphs(model),
    "state_dict": lambda model, folder: model.state_dict(),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "evaluation": lambda model, folder: model.eval()(make_ids()),
    "expert_graphs of the stack": lambda model, folder: expert_graphs(model.model),
    "expert_graphs of a layer": lambda model, folder: expert_graphs(model.model.layers[2]),
    "state_dict of the stack": lambda model, folder: model.model.state_dict(),
    "state_dict of a layer": lambda model, folder: model.model.layers[2].state_dict(),
    "evaluation of the stack": lambda model, folder: model.model.eval()(make_ids()),
    "update of the stack": lambda model, folder: update_graphs(model.model),
    "inference mode": lambda model, folder: torch.inference_mode()(model.eval())(make_ids()),
    "fold": lambda model, folder: export_folded(model, folder),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_last_step_moves_the_graphs_before_they_are_read(reader, tmp_path):
    ids, graphs = make_ids(), []
    for driven in (True, False):
        model = symphonize(make_model(), decay=DECAY).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        if driven:
            update_graphs(model)
        READERS[reader](model, tmp_path / str(driven))
        graphs.append([router.symphony.adjacency.clone() for _, router in symphony_routers(model)])
        assert not update_graphs(model)
    assert all(torch.equal(a, b) for a, b in zip(*graphs, strict=True))
    assert not torch.equal(graphs[0][0], torch.eye(8) * 3 / 8)


def test_a_read_before_the_optimizers_step_moves_nothing():
    model, ids = symphonize(make_model(), decay=DECAY).train(), make_ids()
    before = expert_graphs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    model.state_dict()
    model.eval()(ids)
    assert all(torch.equal(graph, before[name]) for name, graph in expert_graphs(model).items())
    optimizer.step()
    assert update_graphs(model)


@pytest.mark.parametrize("family", ["nllb-moe", "switch_transformers"])
@pytest.mark.parametrize("given", ["labels", "a mask", "inputs"])
def test_padding_that_an_encoder_decoder_makes_of_its_labels_is_left_out(family, given):
    """The labels move to the right behind a start token, so one token more than the labels without -100 is real."""
    with quiet():
        model = symphonize(tiny_model(family), decay=0.0).train()
    model.config.decoder_start_token_id = 2  # Switch has none
    ids = make_ids(2, 8)
    labels = ids.clone()
    labels[0, 4:] = -100
    inputs = {"input_ids": ids, "labels": labels}
    if given == "a mask":
        inputs["decoder_attention_mask"] = (torch.arange(8) < 3).long().expand(2, 8)
    if given == "inputs":
        inputs["decoder_input_ids"] = ids
    model(**inputs).loss.backward()
    pending = tracker_of(model).state.pending
    counters = {counter.owner is model.get_decoder(): counter for counter in tracker_of(model).counters}
    assert len(counters) == 2
    tokens = {is_decoder: pending[counter.key].tokens_L for is_decoder, counter in counters.items()}
    assert (tokens[False] == 16).all()
    assert (tokens[True] == {"labels": 5 + 8, "a mask": 6, "inputs": 16}[given]).all()


def test_a_mask_that_hides_padding_is_named():
    """In a loop that makes its masks itself: for the model, or for the stack in it."""
    model, ids = symphonize(make_model("mixtral")).train(), make_ids()
    causal = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    model(ids, labels=ids).loss.backward()  # no mask: no padding
    with pytest.warns(SymphonyWarning, match="does not say which tokens are padding.*Pass a mask of shape") as caught:
        model(ids, attention_mask=causal, labels=ids).loss.backward()
        model(ids, attention_mask=causal, labels=ids).loss.backward()
    assert len(caught) == 1
    other = symphonize(make_model("mixtral")).train()
    with pytest.warns(SymphonyWarning, match="MixtralModel was given an attention mask that does not say"):
        add_router_losses(other, other.model(ids, attention_mask=causal).last_hidden_state.sum()).backward()
