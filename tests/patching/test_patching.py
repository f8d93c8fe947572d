"""A patched model computes what the base does at the start, and the smoothed model afterwards, however it is used."""

import copy
import pickle
import warnings

import pytest
import torch
from models import llava_inputs, make_ids, make_llava, make_model, move_graphs
from naive_graphs import naive_transition
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyConfig,
    SymphonyWarning,
    expert_graphs,
    fold,
    is_symphonized,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.compat import transformers_version
from symphony_hf.patching import self_check
from symphony_hf.patching.families import inspection
from symphony_hf.patching.symphonize import symphony_routers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strength": 0.3},
        {"normalization": "conditional"},
        {"normalization": "symmetric", "strength": 0.7},
        {"normalization": "centred"},
        {"strength": -0.5},
        {"self_loops": False},
        {"smoothing": "scores"},
        {"smoothing": "scores", "strength": 0.3},
        {"graph": "learned"},
        pytest.param({"graph": "frozen"}, marks=pytest.mark.filterwarnings("ignore:a frozen graph")),
        {"warmup_steps": 10},
    ],
)
def test_the_start_is_bit_for_bit_the_base(family, dtype, settings):
    model, ids = make_model(family, dtype=dtype), make_ids()
    base = model(ids, output_router_logits=True)
    assert symphonize(model, **settings) is model
    ours = model(ids, output_router_logits=True)
    assert torch.equal(ours.logits, base.logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.router_logits, base.router_logits, strict=True))


def test_strength_zero_is_bit_for_bit_the_base_under_any_graph(family):
    model, ids = make_model(family), make_ids()
    base = model(ids).logits
    move_graphs(symphonize(model, strength=0))
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("normalization", ["row", "conditional"])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_the_router_computes_the_formula(family, normalization, self_loops, strength):
    model = make_model(family)
    hidden_TD = 0.1 * torch.randn(7, model.config.hidden_size)  # far from where softmax saturates, into ties
    routers = [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "weight")]
    plain = [router(hidden_TD)[0] for router in routers]
    move_graphs(symphonize(model, strength=strength, normalization=normalization, self_loops=self_loops))
    assert len(routers) == 3
    for router, logits_TE in zip(routers, plain, strict=True):
        matrix = naive_transition(router.symphony.adjacency.tolist(), strength, normalization, self_loops)
        smoothed, weights, indices = router(hidden_TD)
        for t in range(7):
            expected = [sum(matrix[j, k] * logits_TE[t, k] for k in range(len(matrix))) for j in range(len(matrix))]
            # Sums of 32 x E products in another order: a few float32 ulps.
            torch.testing.assert_close(smoothed[t], torch.stack(expected), rtol=1e-4, atol=1e-5)
        assert set(indices[0].tolist()) == set(smoothed[0].topk(router.top_k).indices.tolist())
        scores = smoothed.softmax(-1).gather(1, indices)
        # In proportion to the softmax: one factor a token, renormalized or not as the family does.
        torch.testing.assert_close(weights * scores[:, :1], scores * weights[:, :1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_scores_are_the_mix_of_probabilities(family, strength):
    model = make_model(family)
    hidden_TD = torch.randn(5, model.config.hidden_size)
    routers = [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "weight")]
    plain = [router(hidden_TD)[0].softmax(-1) for router in routers]
    move_graphs(symphonize(model, smoothing="scores", strength=strength))
    for router, before in zip(routers, plain, strict=True):
        matrix = naive_transition(router.symphony.adjacency.tolist(), strength)
        logits, _, indices = router(hidden_TD)
        size = len(matrix)
        for t in range(5):
            expected = torch.stack([sum(before[t, k] * matrix[k, j] for k in range(size)) for j in range(size)])
            torch.testing.assert_close(logits[t].softmax(-1), expected, rtol=1e-4, atol=1e-6)
            assert set(indices[t].tolist()) == set(expected.topk(router.top_k).indices.tolist())


def test_recorded_logits_are_those_that_chose(family):
    model, ids = make_model(family), make_ids()
    model(ids, output_router_logits=True)  # the recording hooks are put in place now, before the patch
    base = model(ids).logits
    move_graphs(symphonize(model))
    seen = []
    for _, router in symphony_routers(model):
        router.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = model(ids, output_router_logits=True)
    assert len(outputs.router_logits) == len(seen) == 3
    for recorded, (logits, _, indices) in zip(outputs.router_logits, seen, strict=True):
        assert torch.equal(recorded, logits)
        assert torch.equal(recorded.topk(indices.shape[1]).indices.sort().values, indices.sort().values)
    assert not torch.allclose(outputs.logits, base)


def test_generate_with_cache_equals_recomputing(family):
    model = move_graphs(symphonize(make_model(family)))
    ids = make_ids(2, 6)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    assert torch.equal(
        model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
    )


def test_the_base_models_balance_loss_is_computed_but_not_added(family):
    model, ids = make_model(family, router_aux_loss_coef=0.5), make_ids()
    plain = model(ids, labels=ids)
    with_aux = model(ids, labels=ids, output_router_logits=True)
    assert with_aux.loss > plain.loss
    symphonize(model)
    ours = model(ids, labels=ids, output_router_logits=True)
    assert torch.equal(ours.aux_loss, with_aux.aux_loss)
    assert torch.equal(ours.loss, plain.loss)
    unsymphonize(model)
    assert torch.equal(model(ids, labels=ids, output_router_logits=True).loss, with_aux.loss)


def test_unsymphonize_restores_everything(family):
    model, ids = make_model(family), make_ids()
    base, keys, config = model(ids).logits, list(model.state_dict()), model.config.to_dict()
    attributes = set(model.__dict__)
    classes = [type(module) for module in model.modules()]
    move_graphs(symphonize(model))
    assert is_symphonized(model)
    assert unsymphonize(model) is model
    assert not is_symphonized(model)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config
    assert set(model.__dict__) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, base)
    symphonize(model)  # and again
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("undo", [unsymphonize, fold])
def test_a_copy_is_undone_without_its_original(undo):
    """Hooks that were left on a copy ran with an emptied tracker, and the original lost its own."""
    original = symphonize(make_model())
    twin = undo(copy.deepcopy(original))
    assert not [name for name, module in twin.named_modules() if module._forward_pre_hooks or module._forward_hooks]
    twin.train()(make_ids()).logits.sum().backward()
    original.train()(make_ids(), labels=make_ids()).loss.backward()
    assert update_graphs(original)


def test_deepcopy_is_independent_and_pickle_is_whole(family):
    model, ids = move_graphs(symphonize(make_model(family))), make_ids()
    logits = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, logits)
        twin.train()
        twin(ids, labels=ids).loss.backward()
        update_graphs(twin)
        moved = expert_graphs(twin)
        assert all(not torch.equal(moved[name], graph) for name, graph in expert_graphs(model).items())
        assert all(p.grad is None for p in model.parameters())
        unsymphonize(twin)
        assert is_symphonized(model)
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_half_precision_keeps_the_graph_in_float32(family, graph):
    model = move_graphs(symphonize(make_model(family), graph=graph))
    graphs = expert_graphs(model)
    parameters = [p for name, p in model.named_parameters() if name.endswith("adjacency")]
    for seed, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    before = [parameter.grad.clone() for parameter in parameters]
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        assert len(parameters) == (3 if graph == "learned" else 0)
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, before, strict=True))
        assert {graph.dtype for graph in expert_graphs(model).values()} == {torch.float32}
        assert all(torch.equal(expert_graphs(model)[name], graph) for name, graph in graphs.items())
        assert {router.weight.dtype for _, router in symphony_routers(model)} == {cast}
    model.half().float()
    assert model(make_ids()).logits.isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_accelerates_hooks_do_not_bypass_the_graph(when, offload_buffers):
    accelerate = pytest.importorskip("accelerate")
    model, ids = make_model("mixtral"), make_ids()
    expected = move_graphs(symphonize(copy.deepcopy(model)))(ids).logits
    if when == "before":
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=offload_buffers)
        symphonize(model)
        move_graphs(model)
    else:
        move_graphs(symphonize(model))
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=offload_buffers)
    assert model.model.layers[0].mlp.gate.weight.is_meta
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"smoothing": "scores"}, marks=pytest.mark.slow),
        pytest.param({"graph": "learned", "warmup_steps": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_torch_compile_fullgraph_gives_the_same(settings):
    """aot_eager traces as inductor does. transformers 5.17 cannot compile grouped_mm experts on a CPU."""
    torch._dynamo.reset()
    eager = move_graphs(symphonize(make_model("mixtral", experts="batched_mm", num_hidden_layers=2), **settings))
    eager.train()
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        ids = make_ids(seed=step)
        a, b = eager(ids, labels=ids), compiled(ids, labels=ids)
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
        a.loss.backward()
        b.loss.backward()
    for (name, p), q in zip(eager.named_parameters(), compiled_model.parameters(), strict=True):
        # Float32 sums in another order.
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(expert_graphs(eager).values(), expert_graphs(compiled_model).values(), strict=True):
        assert torch.equal(a, b)
    eager.eval()
    compiled_model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, eager(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_a_mask_that_hides_the_padding_does_not_break_a_compiled_graph():
    """Eager forwards warn there, which a compiler cannot trace."""
    torch._dynamo.reset()
    model = symphonize(make_model("mixtral", experts="batched_mm", num_hidden_layers=1)).train()
    ids = make_ids()
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(2, 1, -1, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, attention_mask=causal).loss.backward()
    assert update_graphs(model)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, as it traces
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(
            "compile",
            marks=pytest.mark.skipif(
                transformers_version() < "5.24", reason="transformers 5.17 compiles within its checkpoint"
            ),
        ),
        "torch.compile",
    ],
)
def test_compiled_layers_give_the_same_under_checkpointing(wrap):
    torch._dynamo.reset()
    eager = move_graphs(symphonize(make_model("mixtral", experts="batched_mm", num_hidden_layers=2))).train()
    compiled = copy.deepcopy(eager)
    for index, layer in enumerate(compiled.model.layers):
        if wrap == "compile":
            layer.compile(backend="aot_eager")
        else:
            compiled.model.layers[index] = torch.compile(layer, backend="aot_eager")
    ids = make_ids()
    for model in (eager, compiled):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        update_graphs(model)
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)  # float32 sums in another order
    for a, b in zip(expert_graphs(eager).values(), expert_graphs(compiled).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.thorough
def test_an_optimizer_step_does_not_compile_an_evaluation_again():
    torch._dynamo.reset()
    model, ids = symphonize(make_model("mixtral", experts="batched_mm", num_hidden_layers=2)), make_ids()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        compiled(ids)
    number = counter.frame_count
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        compiled.eval()(ids)
    assert counter.frame_count == number


def test_inference_mode_and_then_training():
    """A matrix cached in inference mode would be an inference tensor, which no backward may save."""
    model, ids = symphonize(make_model()), make_ids()
    with torch.inference_mode():
        model(ids)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad is not None


def test_the_cached_matrix_follows_the_graph():
    model, ids = move_graphs(symphonize(make_model())), make_ids()
    first = model(ids).logits
    move_graphs(model, seed=1)
    second = model(ids).logits
    assert not torch.equal(first, second)
    move_graphs(model, seed=0)
    assert torch.equal(model(ids).logits, first)
    state = {name: value.clone() for name, value in model.state_dict().items() if "symphony" in name}
    move_graphs(model, seed=1)
    model.load_state_dict(state, strict=False)
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("graph", ["ema", "learned"])
def test_a_state_dict_with_an_impossible_graph_is_refused(graph):
    model = move_graphs(symphonize(make_model(), graph=graph))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.layers.1.mlp.gate.symphony.adjacency"
    state[name][0, 0] = float("inf")
    kept = model.get_buffer(name).clone() if graph == "ema" else model.get_parameter(name).clone()
    with pytest.raises(RuntimeError, match=f"the graph {name} is not usable: 1 non-finite"):
        model.load_state_dict(state, strict=False)
    assert torch.equal(model.state_dict()[name], kept)


def test_layers_picks_the_layers():
    model, ids = make_model(), make_ids()
    hidden = model(ids, output_hidden_states=True).hidden_states
    move_graphs(symphonize(model, layers=[2]))
    assert list(expert_graphs(model)) == ["model.layers.2.mlp.gate"]
    ours = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(ours[2], hidden[2])
    assert not torch.equal(ours[3], hidden[3])


def test_mixed_dense_and_moe_layers_go_by_their_own_number():
    model = symphonize(make_model("qwen2_moe", decoder_sparse_step=2))
    assert list(expert_graphs(model)) == ["model.layers.1.mlp.gate"]


def test_one_expert_per_token_is_warned_about():
    with pytest.warns(SymphonyWarning, match="no effect"):
        symphonize(make_model("mixtral", num_experts_per_tok=1))


def test_a_learned_graph_gets_gradient_and_stays_a_graph():
    model, ids = symphonize(make_model(), graph="learned").train(), make_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    for step in range(6):
        model(make_ids(seed=step), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_graphs(model)
    for name, adjacency in expert_graphs(model).items():
        start = torch.eye(8) * 3 / 8
        assert not torch.equal(adjacency, start), name
        assert torch.equal(adjacency, adjacency.T)
    assert isinstance(model.model.layers[0].mlp.gate.symphony.adjacency, torch.nn.Parameter)


def test_a_learned_graph_is_seen_and_saved_as_it_is_used(tmp_path):
    """Between an optimizer's step and `update_graphs`, its parameter may be negative and asymmetric."""
    model, ids = symphonize(make_model(), graph="learned").train(), make_ids()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    raw = model.model.layers[0].mlp.gate.symphony.adjacency
    raw.grad.add_(torch.randn(raw.shape))  # as clipping, momentum or weight decay may leave it
    optimizer.step()
    assert raw.min() < 0
    assert not torch.equal(raw, raw.T)
    model.save_pretrained(tmp_path)
    before, logits = expert_graphs(model), model.eval()(ids).logits
    assert all((graph >= 0).all() and torch.equal(graph, graph.T) for graph in before.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert torch.equal(loaded(ids).logits, logits)
    for _ in range(2):  # to the bit, once and again
        update_graphs(model)
        assert torch.equal(raw, before["model.layers.0.mlp.gate"])
        model.train()(ids, labels=ids).loss.backward()
    for graphs in (expert_graphs(loaded), expert_graphs(model)):
        assert all(torch.equal(graphs[name], graph) for name, graph in before.items())
    assert model.state_dict(keep_vars=True)["model.layers.0.mlp.gate.symphony.adjacency"] is raw


def test_warmup_ramps_the_strength():
    model = symphonize(make_model(), warmup_steps=4, strength=0.8).train()
    graph = model.model.layers[0].mlp.gate.symphony
    seen = []
    for step in range(6):
        seen.append(round(float(graph.strength()), 6))
        ids = make_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        update_graphs(model)
    assert seen == [0.0, 0.2, 0.4, 0.6, 0.8, 0.8]


def test_llava_keeps_working_with_images():
    model, inputs = make_llava(), llava_inputs()
    base = model(**inputs).logits
    symphonize(model)
    assert torch.equal(model(**inputs).logits, base)
    move_graphs(model)
    assert not torch.equal(model(**inputs).logits, base)
    assert len(expert_graphs(model)) == 3
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]


def graph_settings(model):
    return model.model.layers[0].mlp.gate.symphony.config


def test_presets():
    paper = symphonize(make_model("olmoe"), preset="paper", decay=0.9)
    assert graph_settings(paper) == SymphonyConfig(decay=0.9)  # while the defaults are the paper's form
    dense = symphonize(make_model("olmoe"), preset="dense_gradient")
    assert graph_settings(dense) == SymphonyConfig(strength=0.0, router_gradient="dense")
    with pytest.raises(ConfigError, match="preset 'papers' is unknown; did you mean `paper`"):
        symphonize(make_model("olmoe"), preset="papers")
    with pytest.raises(ConfigError, match="`preset` takes the place of `config`"):
        symphonize(make_model("olmoe"), SymphonyConfig(), preset="paper")


def test_settings_as_object_mapping_and_overrides():
    for config in (SymphonyConfig(strength=0.25), {"strength": 0.25}, None):
        model = symphonize(make_model(), config, decay=0.5, **({} if config else {"strength": 0.25}))
        graph = model.model.layers[0].mlp.gate.symphony
        assert (graph.config.strength, graph.config.decay) == (0.25, 0.5)


@pytest.mark.parametrize("model", ["allenai/OLMoE-1B-7B-0924", None])
def test_what_is_no_model_is_named(model):
    with pytest.raises(PatchError, match=r"expected a model, got .*load it first"):
        symphonize(model)


def test_a_graph_that_can_never_move_is_warned_about(tmp_path):
    with pytest.warns(SymphonyWarning, match="decay=1 keeps every graph as it is"):
        model = symphonize(make_model(), decay=1.0)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SymphonyWarning)
        symphonize(make_model(), decay=1.0, graph=str(tmp_path))


def test_one_router_of_each_kind_is_run_however_many_layers(monkeypatch):
    """A model of a hundred layers is symphonized as fast as it can be looked through."""
    runs = []
    for module in (inspection, self_check):
        monkeypatch.setattr(module, "Probe", lambda *args, probe=module.Probe: (runs.append(args[0]), probe(*args))[1])
    counts = []
    for layers in (2, 9):
        with torch.device("meta"):
            symphonize(make_model(num_hidden_layers=layers))
        counts.append(len(runs))
        assert set(runs) == {"model.layers.0.mlp.gate"}
        runs.clear()
    assert counts[0] == counts[1] > 0
