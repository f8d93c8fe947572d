"""What an unusual or broken-off forward would leave behind is undone, or the situation is refused."""

import pytest
import torch
from models import make_ids, make_model, move_graphs
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from symphony_hf import (
    PatchError,
    SymphonyCallback,
    SymphonyWarning,
    expert_graphs,
    lora_config,
    record_routing,
    replay_routing,
    symphonize,
    unsymphonize,
    update_graphs,
    with_router_losses,
)
from symphony_hf.patching.attachment import tracker_of


def gates(model):
    return {name: p.grad for name, p in model.named_parameters() if name.endswith("gate.weight")}


def test_a_reference_forward_moves_the_graphs_of_the_adapter_that_was_trained():
    """As in DPO, where the first forward after a step is the reference's, with the adapter off."""
    peft = pytest.importorskip("peft")
    base = symphonize(make_model(), decay=0.5)
    model = peft.get_peft_model(base, lora_config(base, r=2)).train()
    ids = make_ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with model.disable_adapter():
        before = expert_graphs(model)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with model.disable_adapter(), torch.no_grad():
        model(input_ids=ids)
        after = expert_graphs(model)
    assert all(torch.equal(after[name], graph) for name, graph in before.items())
    assert all(not torch.equal(graph, before[name]) for name, graph in expert_graphs(model).items())


def fuse_loss(model):
    """Compute logits and loss in one, past the model's loss function, as kernels such as Liger's do."""

    def forward(input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        output = type(model).forward(model, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        total = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return MoeCausalLMOutputWithPast(loss=total / count)

    model.forward = forward
    return model


@pytest.mark.parametrize("num_items", [None, 30])
def test_a_fused_loss_gives_the_router_losses_the_same_weight(num_items):
    settings = {"balance_loss_weight": 0.5, "z_loss_weight": 0.1}
    plain = move_graphs(symphonize(make_model(), **settings)).train()
    fused = move_graphs(symphonize(fuse_loss(make_model()), **settings)).train()
    for seed in range(2):  # two micro-batches of a step
        ids = make_ids(seed=seed)
        labels = ids.clone()
        labels[0, : 2 + 3 * seed] = -100
        for model in (plain, fused):
            inputs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
            model(input_ids=ids, labels=labels, **inputs).loss.backward()
    expected, actual = gates(plain), gates(fused)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_replicas_in_threads_are_refused_in_training():
    model = symphonize(make_model()).train()
    model.model._is_replica = True  # as DataParallel marks its replicas
    with pytest.raises(PatchError, match="DataParallel trains replicas in threads"):
        model(make_ids())
    model.eval()(make_ids())


class OfItsParts(Trainer):
    """Computes its loss of the model's parts, past the model's own forward."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return model.lm_head(hidden).float().square().mean()


def test_every_micro_batch_of_a_loss_of_parts_has_router_losses(tmp_path):
    model = symphonize(make_model())
    arguments = TrainingArguments(
        tmp_path, max_steps=3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in make_ids(24)]
    trainer = with_router_losses(OfItsParts)(model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()])
    trainer.train()
    logged = [entry["symphony/balance_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert min(logged) > 0


def interrupt(*_):
    raise KeyboardInterrupt


def interrupted(model):
    """Break a training forward off in its second layer, as Ctrl-C would."""
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    ids = make_ids()
    with pytest.raises(KeyboardInterrupt):
        model(ids, labels=ids)
    handle.remove()


@pytest.mark.parametrize("after", ["save", "unsymphonize", "evaluation"])
def test_an_interrupt_leaves_the_models_own_loss_weights(after, tmp_path):
    model = symphonize(make_model("mixtral", router_aux_loss_coef=0.02)).train()
    interrupted(model)
    assert model.config.router_aux_loss_coef == 0.0
    if after == "save":
        model.save_pretrained(tmp_path)
        saved = type(model.config).from_pretrained(tmp_path)
        assert saved.router_aux_loss_coef == 0.02
    elif after == "unsymphonize":
        unsymphonize(model)
    else:
        model.eval()(make_ids())
    assert model.config.router_aux_loss_coef == model.router_aux_loss_coef == 0.02


def test_an_interrupt_while_routing_is_replayed_ends_the_replay():
    model = make_model()
    ids, others = make_ids(seed=1), make_ids(seed=2)
    with torch.no_grad():
        expected = model(others).logits
        with record_routing(model) as choices:
            model(ids)
        router = model.model.layers[1].mlp.gate
        own, router.forward = router.forward, interrupt
        with pytest.raises(KeyboardInterrupt), replay_routing(model, choices):
            model(ids)
        router.forward = own
        assert torch.equal(model(others).logits, expected)


def test_a_mask_belongs_to_the_forward_that_it_was_given_to():
    model = symphonize(make_model("mixtral")).train()
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(tracker_of(model).state.masks.find("attention_mask")))
    ids = make_ids()
    mask = torch.ones_like(ids)
    model(ids, mask, labels=ids)  # by position
    assert seen[0] is mask
    causal = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool).tril().unsqueeze(1)
    with pytest.warns(SymphonyWarning, match="does not say which tokens are padding"):
        model.model(inputs_embeds=model.model.embed_tokens(ids), attention_mask=causal)
    assert seen[1] is None


def test_watches_of_blocks_go_with_their_layers():
    model = symphonize(make_model()).train()
    placed = tracker_of(model).counters[0].placed
    placed.bypassed_blocks(torch.zeros(len(model.model.layers)))
    blocks = [layer.mlp for layer in model.model.layers]
    hooks = [len(block._forward_pre_hooks) for block in blocks]
    del model.model.layers[0]
    model.config.num_hidden_layers -= 1
    ids = make_ids()
    model(ids, labels=ids, use_cache=False).loss.backward()
    update_graphs(model)
    assert [len(block._forward_pre_hooks) for block in blocks] == [number - 1 for number in hooks]


def test_a_graph_that_zero_3_has_partitioned_is_not_returned_as_a_part():
    model = symphonize(make_model(), graph="learned")
    router = model.model.layers[1].mlp.gate
    router.symphony.adjacency.data = torch.empty(0)  # as DeepSpeed leaves a parameter between forwards
    with pytest.raises(PatchError, match=r"partitioned the learned graph of `model\.layers\.1\.mlp\.gate`"):
        expert_graphs(model)
