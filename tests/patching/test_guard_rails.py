"""Failures that would otherwise be silent give one warning or an error."""

import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from gates import HIDDEN, LinearGateBlock
from models import make_ids, make_llava, make_model, move_graphs
from ranks import make_routed_tower
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyCallback,
    SymphonyWarning,
    add_router_losses,
    expert_graphs,
    is_symphonized,
    lora_config,
    symphonize,
    upcycle_modules,
    update_graphs,
)
from symphony_hf.experiments.conformance.tiny import moe_families, tiny_model, why_not_built
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.training_checks import fingerprint


def step(model, seed=0):
    ids = make_ids(seed=seed)
    model(ids, labels=ids).loss.backward()
    return update_graphs(model)


def warned_once(run, match):
    """Run twice: the first time it warns, the second time it does not."""
    with pytest.warns(SymphonyWarning, match=match):
        run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_graph_that_was_cast_past_the_model_is_widened(graph):
    model = symphonize(make_model(), graph=graph).train()
    step(model)
    router = model.model.layers[1].mlp.gate

    def cast_and_step():
        router.symphony.adjacency.data = router.symphony.adjacency.data.half()
        assert step(model)
        assert router.symphony.adjacency.dtype == torch.float32

    warned_once(cast_and_step, "1 graphs were cast to another type than float32")


def replace_block(model):
    """As an engine does that brings MoE blocks of its own."""
    model.model.layers[1].mlp = torch.nn.Linear(32, 32)


def replace_router(model):
    block = model.model.layers[1].mlp
    block.gate = make_model().model.layers[1].mlp.gate


def replace_layer(model):
    model.model.layers[1] = make_model().model.layers[1]


def replace_class(model):
    router = model.model.layers[1].mlp.gate
    router.__class__ = router.base_class


@pytest.mark.parametrize(
    ("replace", "now"),
    [
        (replace_block, "`mlp` of OlmoeDecoderLayer is a Linear"),
        (replace_router, "`gate` of OlmoeSparseMoeBlock is a OlmoeTopKRouter"),
        (replace_layer, "`1` of ModuleList is a OlmoeDecoderLayer"),
        (replace_class, "`gate` of OlmoeSparseMoeBlock is a OlmoeTopKRouter"),
    ],
)
def test_what_takes_the_place_of_a_router_is_refused_by_name(replace, now):
    """After `accelerate.prepare`, `deepspeed.initialize` or any wrapping: at the first training forward."""
    model = symphonize(make_model()).train()
    replace(model)
    wrapped = torch.nn.ModuleDict({"module": model})
    with pytest.raises(PatchError, match=rf"`layers\.1\.mlp\.gate` of OlmoeModel was replaced .*{now} now"):
        step(wrapped["module"])


def test_layers_that_are_dropped_or_moved_have_nothing_in_their_place():
    """In place, by a shorter list, by a dense layer that moves up, and in another order."""
    for change in (
        lambda layers: layers.__delitem__(1),
        lambda layers: layers.insert(0, layers[2]),
        lambda layers: layers._modules.update({"0": layers[2], "2": layers[0]}),
    ):
        model = symphonize(make_model("qwen3_moe", mlp_only_layers=[0], use_cache=False)).train()
        step(model)
        change(model.model.layers)
        assert step(model)
    model.model.layers = model.model.layers[:2]
    assert step(model)


def test_frozen_routers_are_named():
    model = symphonize(make_model()).train()
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    warned_once(lambda: step(model), "every router is frozen")
    without = symphonize(make_model(), balance_loss_weight=0.0, z_loss_weight=0.0).train()
    for layer in without.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    assert step(without)  # nothing to warn about: no loss was meant for them


def test_routers_that_an_adapter_freezes_by_design_are_not_named():
    peft = pytest.importorskip("peft")
    for router in ("graph", "train"):
        model = symphonize(make_model())
        assert step(peft.get_peft_model(model, lora_config(model, router=router)).train())
    by_hand = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["symphony"])
    assert step(peft.get_peft_model(symphonize(make_model()), by_hand).train())


def test_router_losses_that_train_nothing_are_named():
    peft = pytest.importorskip("peft")
    head_alone = peft.LoraConfig(target_modules=["lm_head"], modules_to_save=["symphony"])
    model = peft.get_peft_model(symphonize(make_model()), head_alone).train()
    warned_once(lambda: step(model), "every router is frozen, .* have no effect, .* train the routers")


def test_an_optimizer_of_a_loop_of_ones_own_without_the_routers_is_named():
    model = symphonize(make_model()).train()
    parameters = [p for name, p in model.named_parameters() if "gate.weight" not in name]
    optimizers = [torch.optim.SGD(part, lr=0.01) for part in (parameters[:5], parameters[5:])]
    other = torch.nn.Linear(2, 2)
    stranger = torch.optim.SGD(other.parameters(), lr=0.01)

    def train_a_step():
        ids = make_ids()
        model(ids, labels=ids).loss.backward()
        for optimizer in (stranger, *optimizers):
            optimizer.step()
        assert update_graphs(model)

    warned_once(train_a_step, r"does not hold 3 of 3 router parameters \(layers\.0\.mlp\.gate\.weight, \.\.\.\)")


def test_routers_may_have_an_optimizer_of_their_own():
    model, ids = symphonize(make_model()).train(), make_ids()
    model(ids, labels=ids).loss.backward()
    for wanted in (False, True):
        parameters = [p for name, p in model.named_parameters() if ("gate.weight" in name) == wanted]
        torch.optim.SGD(parameters, lr=0.01).step()
    assert update_graphs(model)  # warnings are errors


def train(model, tmp_path, parameters):
    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(4, 8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    Trainer(
        model, arguments, train_dataset=rows, callbacks=[SymphonyCallback()], optimizers=(optimizer, scheduler)
    ).train()


def test_an_optimizer_without_the_routers_is_named(tmp_path):
    model = symphonize(make_model())
    parameters = [p for name, p in model.named_parameters() if "gate.weight" not in name]
    with pytest.warns(SymphonyWarning, match=r"does not hold 3 of 3 router parameters \(model\.layers\.0\.mlp\.gate"):
        train(model, tmp_path, parameters)


def test_an_optimizer_that_was_made_before_the_graph_is_named(tmp_path):
    model = make_model()
    parameters = list(model.parameters())
    symphonize(model, graph="learned")
    with pytest.warns(SymphonyWarning, match="does not hold 3 of 6 router parameters .*adjacency"):
        train(model, tmp_path, parameters)


def test_an_optimizer_with_everything_is_not(tmp_path):
    model = symphonize(make_model())
    train(model, tmp_path, model.parameters())


def test_strength_zero_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="symphony_hf"):
        symphonize(make_model(), strength=0.0)
    assert "strength is 0" in caplog.text
    caplog.clear()
    symphonize(make_model())
    assert caplog.text == ""


@pytest.fixture
def two_ranks(monkeypatch):
    """Make this process the first of two ranks. The other has what `other` makes of a tensor."""
    others = {"sum": lambda tensor: tensor.clone(), "max": lambda tensor: tensor}

    def all_reduce(tensor, op=dist.ReduceOp.SUM):
        if op == dist.ReduceOp.MAX:
            tensor.copy_(torch.maximum(tensor, others["max"](tensor.clone())))
        else:
            tensor.add_(others["sum"](tensor.clone()))

    for module in ("counting", "graph_updates", "training_checks", "training_state"):
        monkeypatch.setattr(f"symphony_hf.patching.{module}.num_ranks", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return others


def test_all_models_in_a_wrapper_are_served():
    """A policy and its value model, say, with one loss."""
    both = torch.nn.ModuleDict({name: symphonize(make_model()) for name in ("policy", "value")}).train()
    alone, ids = symphonize(make_model()).train(), make_ids()
    for model, modules in ((both, both.values()), (alone, [alone])):
        loss = sum(module(ids).logits.square().mean() for module in modules)
        add_router_losses(model, loss).backward()
        assert update_graphs(model)
    for module in both.values():
        for name, graph in expert_graphs(alone).items():
            assert torch.equal(expert_graphs(module)[name], graph)
        for parameter, expected in zip(module.parameters(), alone.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad)
    with pytest.raises(PatchError, match="2 Symphony models"):
        tracker_of(both)
    both["value"].requires_grad_(False)
    assert tracker_of(both) is tracker_of(both["policy"])  # as the callbacks find it beside a frozen teacher


def test_graphs_that_differ_between_ranks_are_named(two_ranks):
    model = symphonize(make_model()).train()
    step(model)  # looked at: the same
    checks = tracker_of(model).checks
    assert checks.num_commits == 1
    num_graphs = len(expert_graphs(model))
    two_ranks["max"] = lambda tensor: tensor + torch.tensor([1, *[0] * (2 * num_graphs - 1)])
    checks.num_commits = 100
    with pytest.warns(SymphonyWarning, match=f"1 of {num_graphs} graphs differ between the ranks"):
        step(model)


def test_a_rank_that_runs_no_router_takes_part_in_the_commit(two_ranks):
    """Whether the loop commits or the next forward does: the other rank, with images, waits for its counts."""
    model, ids, sent = make_routed_tower(), make_ids(), []
    two_ranks["sum"] = lambda tensor: sent.append(tensor) or tensor
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = expert_graphs(model)
    for step in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert step == 1 or update_graphs(model)
    with pytest.warns(SymphonyWarning, match="nothing moved the graphs"):
        model(ids, labels=ids)
    assert [float(tensor.abs().sum()) for tensor in sent] == [0, 0]
    optimizer.step()  # of a forward whose backward never came: nothing to take part in
    assert not update_graphs(model)
    assert all(torch.equal(graph, before[name]) for name, graph in expert_graphs(model).items())


def test_a_fingerprint_knows_every_bit_its_place_and_the_updates():
    model = move_graphs(symphonize(make_model()))
    graph = model.model.layers[0].mlp.gate.symphony
    kept, seen = graph.adjacency.clone(), {int(fingerprint(graph))}
    order = torch.tensor([1, 0, *range(2, graph.num_experts)])
    others = [kept[order][:, order], kept.T.contiguous().flip(0), torch.nextafter(kept, kept + 1), -kept]
    for place in range(graph.num_experts):
        other = kept.clone()
        other[place, place] = torch.nextafter(other[place, place], other[place, place] + 1)
        others.append(other)
    for other in others:
        graph.adjacency.copy_(other)
        seen.add(int(fingerprint(graph)))
    graph.adjacency.copy_(kept)
    graph.updates.add_(1)
    seen.add(int(fingerprint(graph)))
    assert len(seen) == len(others) + 2
    graph.updates.sub_(1)
    assert int(fingerprint(graph)) in seen


def test_global_balance_takes_the_load_of_all_ranks(two_ranks):
    """The other rank's tokens all chose experts 0 and 1, so the gradient must push away from these."""
    gradients = {}
    for scope in ("local", "global"):
        model = move_graphs(symphonize(make_model("mixtral"), balance_loss_weight=1.0, balance_scope=scope)).train()
        other = torch.tensor([24.0, 24.0, 0.0, 0.0, 0.0, 0.0])
        sent = torch.cat([other, other[:1]])  # with the number of its tokens
        two_ranks["sum"] = lambda tensor, sent=sent: sent.expand(tensor.shape) if tensor.shape == (3, 7) else tensor
        ids = make_ids()
        seen = []
        hook = lambda module, args, output, seen=seen: seen.append((args[0], *output))  # noqa: E731
        model.model.layers[2].mlp.gate.register_forward_hook(hook)
        model(ids, labels=ids).loss.backward()
        gradients[scope] = model.model.layers[2].mlp.gate.weight.grad.clone()
    hidden, logits, _, indices = seen[0]
    weight = model.model.layers[2].mlp.gate.weight.detach().clone().requires_grad_()
    graph = model.model.layers[2].mlp.gate.symphony
    probabilities = (hidden.detach() @ (graph.transition() @ weight).T).softmax(-1)
    loads = torch.zeros_like(logits).scatter(1, indices, 1.0).sum(0) + other

    def naive(load):
        return torch.autograd.grad(6 / 3 * (load * probabilities.mean(0)).sum(), weight, retain_graph=True)[0]

    own = torch.zeros_like(logits).scatter(1, indices, 1.0).mean(0)
    expected = naive(loads / 48) - naive(own)
    # Float32 sums of a few hundred terms in another order.
    torch.testing.assert_close(gradients["global"] - gradients["local"], expected, rtol=1e-3, atol=1e-6)


def test_global_balance_gives_each_of_two_forwards_its_own_load(two_ranks):
    """After two forwards and one backward, the gradient is the sum of each alone."""

    def gradient(*seeds):
        model = move_graphs(symphonize(make_model("mixtral"), balance_loss_weight=1.0, balance_scope="global")).train()
        sum(model(make_ids(seed=seed), labels=make_ids(seed=seed)).loss for seed in seeds).backward()
        return model.model.layers[2].mlp.gate.weight.grad

    # Float32 sums in another order.
    torch.testing.assert_close(gradient(0, 1), gradient(0) + gradient(1), rtol=1e-4, atol=1e-6)


def test_global_balance_refuses_what_a_batch_may_leave_out(tmp_path):
    """A rank without images would not take part in the all-reduce of the vision tower's load."""
    tower, projector = "*vision_tower*.mlp", "*multi_modal_projector"
    model = upcycle_modules(make_llava(), tower)
    symphonize(upcycle_modules(make_llava(), projector), balance_scope="global")  # which LlavaModel itself runs
    symphonize(tiny_model("nllb-moe"), balance_scope="global")  # an encoder-decoder runs both its stacks
    with pytest.raises(ConfigError, match=r"`model\.vision_tower\.\S+` is in a CLIPVision.*balance_scope='local'"):
        symphonize(model, balance_scope="global")
    assert not is_symphonized(model)
    symphonize(upcycle_modules(make_llava(), tower), balance_scope="local")
    with pytest.warns(SymphonyWarning, match="`balance_scope` .* is read only with"):  # without a loss, nothing waits
        symphonize(upcycle_modules(make_llava(), tower), balance_scope="global", balance_loss_weight=0.0)
    symphonize(model).config.symphony["balance_scope"] = "global"
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="leaves out"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["llava+olmoe", "ernie4_5_vl_moe", "gemma4", "glm4v_moe", "qwen3_vl_moe"])
def test_global_balance_takes_models_of_images_whose_text_is_routed(case):
    if "+" not in case and (case not in moe_families() or why_not_built(case)):
        pytest.skip("not in the installed transformers")
    symphonize(make_llava() if "+" in case else tiny_model(case), balance_scope="global")


def test_a_call_at_every_micro_batch_moves_the_graphs_once_per_optimizer_step():
    """Once the optimizer is known, counts stay pending until it steps."""

    def graphs(every_micro_batch):
        model = symphonize(make_model(), decay=0.5).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for number in range(8):
            ids = make_ids(seed=number)
            model(ids, labels=ids).loss.backward()
            steps = number == 0 or number % 3 == 1
            if steps:
                optimizer.step()
                optimizer.zero_grad()
            if steps or every_micro_batch:
                update_graphs(model)
        return expert_graphs(model)

    expected, observed = graphs(False), graphs(True)
    assert all(torch.equal(graph, observed[name]) for name, graph in expected.items())


def test_an_optimizer_that_never_steps_again_is_named():
    model, ids = symphonize(make_model()).train(), make_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    update_graphs(model)
    model(ids, labels=ids).loss.backward()

    def call():
        for _ in range(100):
            assert not update_graphs(model)

    warned_once(call, "took no step")


class OwnLoss(torch.nn.Module):
    """A model whose loop may call a method of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(LinearGateBlock(), LinearGateBlock())

    def forward(self, x):
        return self.blocks(x)

    def loss(self, x):
        return self.blocks(x).square().mean()


def run_layers(model, ids):
    """As a pipeline written by hand does."""
    inner = model.model
    hidden, positions = inner.embed_tokens(ids), torch.arange(ids.shape[1]).unsqueeze(0)
    rotary = inner.rotary_emb(hidden, positions)
    for layer in inner.layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    return model.lm_head(inner.norm(hidden)).square().mean()


PAST_THE_FORWARD = {
    "a method": ("OwnLoss", lambda model: model.loss(torch.randn(4, HIDDEN))),
    "forward": ("OwnLoss", lambda model: model.forward(torch.randn(4, HIDDEN)).square().mean()),
    "layers": ("OlmoeModel", lambda model: run_layers(model, make_ids())),
}


def symphonized_for(owner):
    return symphonize(make_model()) if owner == "OlmoeModel" else symphonize(OwnLoss(), routers="*.gate")


@pytest.mark.parametrize("way", PAST_THE_FORWARD)
@pytest.mark.parametrize("updates", [True, False], ids=["with update_graphs", "without"])
def test_a_loop_that_goes_past_the_forward_is_told(way, updates):
    """Also after a step that went through it, whose record is not written to again."""
    owner, loss_of = PAST_THE_FORWARD[way]
    for counted_before in (False, True):
        model = symphonized_for(owner).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if counted_before:
            inputs = make_ids() if owner == "OlmoeModel" else torch.randn(4, HIDDEN)
            out = model(inputs)
            add_router_losses(model, getattr(out, "logits", out).square().mean()).backward()
            assert update_graphs(model)

        def step(model=model, optimizer=optimizer):
            add_router_losses(model, loss_of(model)).backward()
            optimizer.step()
            assert not (updates and update_graphs(model))

        warned_once(step, rf"routers of {owner} ran outside of its forward.*call the model, or its {owner}, itself")


def test_what_trains_nothing_may_go_past_the_forward():
    """Without gradient, in evaluation mode, under torch.func, and with no step after it."""
    model = symphonized_for("OwnLoss")
    x = torch.randn(4, HIDDEN)
    model.eval().loss(x).backward()
    model.train()
    with torch.no_grad():
        model.loss(x)
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(parameters)
    model.loss(x)  # with gradient, but nothing goes backward through it
    add_router_losses(model, model(x).square().mean()).backward()
    assert update_graphs(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_second_backward_through_checkpoints_is_no_way_past_the_forward(use_reentrant):
    model, ids = symphonize(make_model()).train(), make_ids()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(ids, labels=ids).loss
    for is_last in (False, True):
        if use_reentrant and is_last:
            break  # torch frees what it recomputes from
        loss.backward(retain_graph=not is_last)
    optimizer.step()
    assert update_graphs(model)


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 2), (4, 4)])
def test_a_graph_of_experts_that_are_all_chosen_is_named(num_experts, top_k):
    def make():
        return make_model("mixtral", num_local_experts=num_experts, num_experts_per_tok=top_k)

    with pytest.warns(SymphonyWarning, match="3 of 3 routers .*choose all of their experts.*fewer experts per token"):
        model = symphonize(make(), decay=0.0).train()
    step(model)
    logits = model(make_ids(), output_router_logits=True).router_logits[0]
    # The uniform graph gives all experts the mean logit, up to the rounding of a float32 sum.
    torch.testing.assert_close(logits, logits.mean(1, keepdim=True).expand_as(logits), rtol=0, atol=1e-6)
    for harmless in ({"strength": 0.0}, {"normalization": "centred"}, {"graph": "learned"}):
        symphonize(make(), **harmless)
    with pytest.warns(SymphonyWarning) as caught:  # a graph that stays as it is becomes nothing
        symphonize(make(), decay=1.0)
    assert "choose all" not in str(caught[0].message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph": "learned", "strength": 0.0}, "a learned graph has no gradient"),
        ({"graph": "learned", "decay": 0.5}, r"`decay` \(0.5\) is read only with graph='ema'"),
        ({"bias_rate": 0.1}, "`bias_rate` .*balance='bias'"),
        ({"num_neighbours": 4}, "`num_neighbours` .*router_gradient="),
        ({"router_gradient": "dense", "num_neighbours": 4}, "`num_neighbours` .*router_gradient="),
        ({"balance_loss_weight": 0.0, "balance_scope": "step"}, "`balance_scope` .*balance_loss_weight above 0"),
        ({"bias_rate": 0.1, "num_neighbours": 4}, "`bias_rate` .*; `num_neighbours` .*Leave them out"),
    ],
    ids=str,
)
def test_settings_that_nothing_reads_are_named_once(settings, message):
    with pytest.warns(SymphonyWarning, match=message) as caught:
        symphonize(make_model(), **settings)
    assert len(caught) == 1


def test_settings_of_a_baseline_are_not():
    """The same run with strength 0, whatever its graph would be."""
    for settings in ({"decay": 0.5}, {"normalization": "centred"}, {"warmup_steps": 3}, {"self_loops": False}):
        symphonize(make_model(), strength=0.0, **settings)
