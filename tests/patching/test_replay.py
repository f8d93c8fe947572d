"""record_routing and replay_routing: which experts are chosen again, by whom they are counted, and what is refused."""

import copy
import inspect

import pytest
import torch
from gates import make_home_made
from models import gradients, make_ids, make_model, move_graphs
from transformers import DynamicCache

from symphony_hf import (
    DataError,
    PatchError,
    RoutingChoices,
    UnsupportedModelError,
    add_router_losses,
    expert_graphs,
    record_routing,
    replay_routing,
    symphonize,
    update_graphs,
)
from symphony_hf.experiments.conformance.naive import naive_counts, watch_choices
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.patching.replay.layout import read_layout


def recorded(model, **inputs):
    with torch.no_grad(), record_routing(model) as choices:
        model(**inputs)
    return choices


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def cache_name(model):
    """The argument for a cache: versions of transformers differ."""
    return next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)


def prefilled(model, ids):
    cache = DynamicCache()
    model(ids, use_cache=True, **{cache_name(model): cache})
    return cache


def loss_of(model, ids, **inputs):
    loss = model(input_ids=ids, **inputs).logits.logsumexp(-1).square().mean()
    return add_router_losses(model, loss) if hasattr(model, "_symphony_tracker") else loss


@pytest.fixture(params=["stock", "with a graph"])
def model(request):
    model = make_model()
    return model if request.param == "stock" else move_graphs(symphonize(model, balance_loss_weight=0.5))


@pytest.fixture
def other():
    """Choices of another model of the same shape."""
    return recorded(make_model(seed=1), input_ids=make_ids())


def test_its_own_choices_replayed_change_no_bit(model, family):
    model = make_model(family) if not hasattr(model, "_symphony_tracker") else symphonize(make_model(family))
    ids, hooks = make_ids(), num_hooks(model)
    choices = recorded(model.train(), input_ids=ids)
    assert choices.experts.shape == (3, 2, 12, choices.experts.shape[-1])
    loss = loss_of(model, ids)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with replay_routing(model, choices):
        again = loss_of(model, ids)
    again.backward()
    assert torch.equal(again, loss)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    del loss, again
    assert num_hooks(model) == hooks


def test_other_choices_reach_the_experts_with_weights_of_the_current_logits(model, other):
    ids = make_ids()
    reached, outputs = watch_choices(model), []
    router = model.model.layers[1].mlp.gate
    router.register_forward_hook(lambda module, args, output: outputs.append(output))
    with replay_routing(model, other):
        model(input_ids=ids)
    for layer, chosen in enumerate(reached.values()):
        assert torch.equal(chosen[0], other.experts[layer].flatten(0, 1).long())
    logits, weights, indices = outputs[0]
    for token in range(len(logits)):  # OLMoE's weights are not normalized
        wanted = logits[token].softmax(-1)[indices[token]]
        torch.testing.assert_close(weights[token], wanted)


def test_the_gradient_is_that_of_the_replayed_weights(other):
    """Against finite differences: the choices are constant, so the loss is smooth in the router's weight."""
    model, ids = make_model(dtype=torch.float64, experts="eager"), make_ids()
    weight = model.model.layers[0].mlp.gate.weight
    with replay_routing(model, other):
        loss_of(model, ids).backward()
        step = 1e-3 * weight.grad / weight.grad.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
                losses.append(loss_of(model, ids))
                weight.sub_(sign * step)
    # The softmax of a router of OLMoE is float32.
    torch.testing.assert_close((weight.grad * step).sum() * 2, losses[0] - losses[1], rtol=1e-2, atol=0)


def test_the_graph_counts_the_replayed_choices(other):
    model, ids = symphonize(make_model(), decay=0.0), make_ids()
    mask = torch.ones_like(ids)
    with replay_routing(model.train(), other):
        loss_of(model, ids, attention_mask=mask).backward()
    update_graphs(model)
    for layer, graph in enumerate(expert_graphs(model).values()):
        pairs, num_tokens = naive_counts([other.experts[layer].flatten(0, 1)], mask, 8)
        torch.testing.assert_close(graph, pairs / num_tokens)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_in_backward_replay_after_the_context(reentrant, model, other):
    """Two forwards in one backward, each with choices of its own."""
    ids = make_ids()

    def trained():
        model.zero_grad()
        with replay_routing(model.train(), other):
            first, second = (loss_of(model, ids[row : row + 1]) for row in range(2))
        (first + 2 * second).backward()
        return gradients(model)

    plain = trained()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    hooks = num_hooks(model)
    checkpointed = trained()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    assert num_hooks(model) == hooks


def padded(ids, lengths, side):
    length = max(lengths) + 2
    rows, mask = torch.zeros(len(ids), length).long(), torch.zeros(len(ids), length).long()
    for row, number in enumerate(lengths):
        span = slice(0, number) if side == "right" else slice(length - number, length)
        rows[row, span], mask[row, span] = ids[row, :number], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": rows, "attention_mask": mask, "position_ids": positions}


def test_padding_on_either_side_packing_and_cuts_give_the_same_choices(model, other):
    ids, lengths = make_ids(), (7, 12)
    expected = [other.experts[:, row, :number] for row, number in enumerate(lengths)]
    packed = {
        "input_ids": torch.cat([ids[0, :7], ids[1]]).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(7), torch.arange(12)]).unsqueeze(0),
    }
    for inputs in (padded(ids, lengths, "left"), padded(ids, lengths, "right"), packed):
        with replay_routing(model, other), record_routing(model) as choices, torch.no_grad():
            model(**inputs)
        assert choices.lengths().tolist() == list(lengths)
        for row, wanted in enumerate(expected):
            assert torch.equal(choices.experts[:, row, : lengths[row]], wanted)
            assert torch.equal(choices.tokens[row, : lengths[row]], ids[row, : lengths[row]].int())


def test_a_row_of_padding_alone_is_replayed(model):
    inputs = padded(make_ids(), (0, 12), "right")
    choices = recorded(model, **inputs)
    assert choices.lengths().tolist() == [0, 12]
    with replay_routing(model, choices), record_routing(model) as again, torch.no_grad():
        model(**inputs)
    assert torch.equal(again.experts, choices.experts)


def test_generation_is_recorded_token_by_token(model):
    inputs = padded(make_ids(), (5, 9), "left")
    inputs.pop("position_ids")
    with record_routing(model) as choices:
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert choices.lengths().tolist() == [8, 12]  # the last token runs through no forward
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4).long()], dim=1)
    whole = recorded(model, input_ids=tokens, attention_mask=mask)
    assert torch.equal(whole.experts[:, 0, :8], choices.experts[:, 0, :8])
    assert torch.equal(whole.experts[:, 1, :12], choices.experts[:, 1])
    with replay_routing(model, choices):  # which leaves the last token to the router
        model(input_ids=tokens, attention_mask=mask)


def test_generation_with_a_cache_replays(model, other):
    """Decoding by hand: a prefill of five tokens, then one token after the other."""
    ids, cache = make_ids(), DynamicCache()
    name = cache_name(model)
    with torch.no_grad(), replay_routing(model, other), record_routing(model) as choices:
        for span in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 12))):
            model(input_ids=ids[:, span], use_cache=True, **{name: cache})
    assert torch.equal(choices.experts, other.experts)


def test_each_forward_takes_the_next_sequences(model, other):
    ids = make_ids()
    with torch.no_grad(), replay_routing(model, other), record_routing(model) as choices:
        for row in (0, 1, 0):  # after the last, the first
            model(input_ids=ids[row : row + 1])
    assert torch.equal(choices.experts, other[[0, 1, 0]].experts)


class OutOfMemory(RuntimeError):
    pass


def out_of_memory(*_):
    raise OutOfMemory


def test_a_forward_that_fails_takes_no_sequences(model, other):
    """A retry, as after memory ran out, replays and records the sequences of the forward that failed."""
    ids = make_ids()
    with torch.no_grad(), replay_routing(model, other), record_routing(model) as choices:
        for row in range(2):
            handle = model.model.layers[1].register_forward_pre_hook(out_of_memory)
            with pytest.raises(OutOfMemory):
                model(input_ids=ids[row : row + 1])
            handle.remove()
            model(input_ids=ids[row : row + 1])
    assert torch.equal(choices.experts, other.experts)
    assert torch.equal(choices.tokens, ids.int())


def test_padding_that_a_mask_of_four_dimensions_hides_is_refused(model):
    inputs = padded(make_ids(), (5, 9), "left")
    inputs.pop("position_ids")
    with record_routing(model), pytest.raises(PatchError, match=r"mask of shape \(2, 1, 11, 12\) and .* the 2-D mask"):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation="static")
    with record_routing(model) as choices:  # nothing is hidden without padding
        model.generate(make_ids(), max_new_tokens=2, min_new_tokens=2, do_sample=False, cache_implementation="static")
    assert choices.lengths().tolist() == [13, 13]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_packed_rows_with_a_mask_of_four_dimensions_hide_nothing(dtype, model, other):
    """Each token attends to those before it in its own sequence, so each is attended to, at least by itself."""
    ids, sequence = make_ids(), torch.tensor([0] * 5 + [1] * 7)
    allowed = (sequence[:, None] == sequence).tril()[None, None]
    mask = allowed if dtype is torch.bool else torch.zeros(12, 12).masked_fill(~allowed, torch.finfo(dtype).min)
    inputs = {
        "input_ids": torch.cat([ids[0, :5], ids[1, :7]]).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0),
        "attention_mask": mask.reshape(1, 1, 12, 12),
    }
    with replay_routing(model, other), record_routing(model) as choices, torch.no_grad():
        model(**inputs)
    assert choices.lengths().tolist() == [5, 7]
    for row, length in enumerate((5, 7)):
        assert torch.equal(choices.experts[:, row, :length], other.experts[:, row, :length])


def test_masks_by_layer_are_read_alike():
    """As a static cache has them for models with sliding attention."""
    ids, positions = make_ids(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    packed = (torch.arange(6)[:, None] // 3 == torch.arange(6) // 3).tril()[None, None]
    narrow = packed.triu(-1)
    masks = {"full_attention": packed, "sliding_attention": narrow, "linear_attention": None}
    arguments = {"input_ids": ids, "position_ids": positions, "attention_mask": masks}
    layout = read_layout(make_model(), arguments)
    assert layout.index_T.tolist() == [0, 1, 2, 0, 1, 2]
    hidden = masks | {"full_attention": packed & (torch.arange(6) > 0)}
    with pytest.raises(PatchError, match=r"attention mask by layer and .* the 2-D mask"):
        read_layout(make_model(), arguments | {"attention_mask": hidden})


def test_one_sequence_is_taken_by_its_index(other):
    for taken in (other[1], other[-1], list(other)[1]):
        assert torch.equal(taken.experts, other.experts[:, 1:])
        assert torch.equal(taken.tokens, other.tokens[1:])
        assert taken.lengths().tolist() == [12]
    with pytest.raises(DataError, match=r"shape \(layers, sequences, positions, top_k\), got \(3, 12, 3\)"):
        RoutingChoices(other.experts[:, 0])


def test_choices_are_saved_and_loaded(other, tmp_path):
    other.save(tmp_path / "choices.safetensors")
    loaded = RoutingChoices.load(tmp_path / "choices.safetensors")
    assert all(torch.equal(getattr(loaded, name), getattr(other, name)) for name in ("experts", "tokens"))
    assert (loaded.routers, loaded.num_experts) == (other.routers, other.num_experts)
    assert loaded.experts.dtype == torch.int16
    (tmp_path / "cut").write_bytes((tmp_path / "choices.safetensors").read_bytes()[:50])
    for name in ("cut", "missing"):
        with pytest.raises(DataError, match=f"{name}` cannot be read as routing choices"):
            RoutingChoices.load(tmp_path / name)


def test_arrays_of_vllm_are_taken_as_they_come(model, other):
    """One array (positions, layers, top_k) for each sequence, one position short; dense layers have zeros."""
    ids, lengths = make_ids(), (7, 12)
    arrays = [other.experts[:, row, : n - 1].transpose(0, 1).int().numpy() for row, n in enumerate(lengths)]
    with torch.no_grad(), replay_routing(model, arrays), record_routing(model) as choices:
        model(**padded(ids, lengths, "right"))
    for row, n in enumerate(lengths):
        assert torch.equal(choices.experts[:, row, : n - 1], other.experts[:, row, : n - 1])
    with torch.no_grad(), replay_routing(model, other.experts):
        model(input_ids=ids)


def test_dense_layers_of_vllms_arrays_are_left_out():
    model = make_model("qwen3_moe", mlp_only_layers=[0])
    whole = recorded(model, input_ids=make_ids())
    dense = torch.zeros_like(whole.experts[:1])
    with torch.no_grad(), replay_routing(model, torch.cat([dense, whole.experts])), record_routing(model) as choices:
        model(input_ids=make_ids())
    assert torch.equal(choices.experts, whole.experts)
    with (
        pytest.raises(DataError, match="of 3 layers, and the model has 2 routers"),
        replay_routing(model, torch.cat([dense + 1, whole.experts])),
    ):
        pass


def wrong_choices(other):
    repeated = other.experts.clone()
    repeated[1, 1, 4] = torch.tensor([3, 3, 1])
    yield "every choice of sequence 1 is expert 0", [other.experts[:, 0].transpose(0, 1), torch.zeros(5, 3, 3)]
    yield r"token 4 of sequence 1 chose an expert twice in layer 1 \(\[3, 3, 1\]\)", repeated
    yield "2 layers, and the model has 3 routers", other.experts[:2]
    yield "outside of the 8 experts", other.experts + 3
    yield "2 of 8 experts, and `model.layers.0.mlp.gate` chooses 3 of 8", other.experts[..., :2]
    yield "expected choices of shape", [torch.zeros(3, 3)]
    yield "no choices of experts", 3
    yield "there are no choices", RoutingChoices()


def test_wrong_choices_are_refused_before_anything_changes(model, other):
    hooks = num_hooks(model)
    for complaint, choices in wrong_choices(other):
        with pytest.raises(DataError, match=complaint), replay_routing(model, choices):
            pytest.fail("the context began")
        assert num_hooks(model) == hooks


def test_choices_of_other_sequences_are_refused(model, other):
    ids = make_ids()
    for complaint, inputs in (
        ("has other tokens", ids.flip(0)),
        (r"a forward of 4 sequences, and choices of 2 more \(of 2\)", ids.repeat(2, 1)),
        ("has more than 13 tokens, and choices of 12", torch.cat([ids, ids], dim=1)),
    ):
        with pytest.raises(DataError, match=complaint), replay_routing(model, other):
            model(input_ids=inputs)


def test_what_would_pass_the_hooks_is_refused(model, other):
    with pytest.raises(PatchError, match="no forward of OlmoeForCausalLM ran"), replay_routing(model, other):
        pass
    with pytest.raises(PatchError, match="ran outside of a forward of OlmoeForCausalLM"), replay_routing(model, other):
        model.model(make_ids())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(PatchError, match="is compiled"), replay_routing(compiled, other):
        pass
    with pytest.raises(PatchError, match="record the prompt"), record_routing(model):
        model(make_ids(), attention_mask=torch.ones(2, 15))


@pytest.mark.parametrize(("family", "reason"), [("phimoe", "one top-k"), ("switch_transformers", "its encoder")])
@pytest.mark.filterwarnings("ignore")
def test_families_that_choose_otherwise_are_refused(family, reason):
    with pytest.raises(UnsupportedModelError, match=reason), record_routing(tiny_model(family)):
        pass


def test_a_router_gradient_of_other_experts_is_refused(other):
    """Its own top-k over the experts would be taken for the router's."""
    model = symphonize(make_model(), router_gradient="random", balance_loss_weight=0.0)
    with pytest.raises(PatchError, match="router_gradient='chosen'"), replay_routing(model, other):
        pass


def test_a_block_that_chooses_itself_replays():
    """The gate is an nn.Linear, and the top-k is in its block."""
    model, ids = make_home_made(), make_ids() % 64
    symphonize(model, routers="*.gate", decay=0.0)
    own = recorded(model, input_ids=ids)
    given = copy.copy(own)
    given.experts = (own.experts + 1) % 6
    with replay_routing(model.train(), given):
        loss_of(model, ids).backward()
    update_graphs(model)
    for layer, graph in enumerate(expert_graphs(model).values()):
        assert torch.equal(model.layers[layer]["moe"].last_choice, given.experts[layer].flatten(0, 1).long())
        pairs, num_tokens = naive_counts([given.experts[layer].flatten(0, 1)], torch.ones(ids.shape), 6)
        torch.testing.assert_close(graph, pairs / num_tokens)


SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def test_beams_are_refused(model):
    """They reorder the cache, so a row's tokens are no sequence's."""
    prompt, hooks = make_ids(2, 5), num_hooks(model)
    with pytest.raises(PatchError, match=r"record_routing: the rows of the cache.*num_beams=1"), record_routing(model):
        model.generate(prompt, num_beams=4, **SETTINGS)
    assert num_hooks(model) == hooks
    with record_routing(model) as choices:
        model.generate(prompt, **SETTINGS)
    with replay_routing(model, choices.experts):
        cache = prefilled(model, prompt)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(PatchError, match="replay_routing: the rows of the cache"):
            model(prompt[:, :1], **{cache_name(model): cache})


def test_another_cache_is_refused(model):
    first, second = make_ids(2, 5), make_ids(2, 5, seed=1)
    with record_routing(model):
        cache = prefilled(model, first)
        prefilled(model, second)
        with pytest.raises(PatchError, match="with one cache at a time"):
            model(first[:, :1], **{cache_name(model): cache})


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_that_is_cut_or_filled_in_place_keeps_its_rows(model, settings):
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    with record_routing(model) as choices:
        tokens = model.generate(prompt, **SETTINGS, **settings)
    expected = recorded(model, input_ids=tokens[:, :-1])
    assert torch.equal(choices.tokens, expected.tokens)
    assert torch.equal(choices.experts.sort(-1).values, expected.experts.sort(-1).values)


def test_a_copied_or_reordered_cache_of_the_same_rows_continues(model):
    prompt = make_ids(1, 5).repeat(2, 1)
    with torch.no_grad(), record_routing(model) as choices:
        cache = copy.deepcopy(prefilled(model, prompt))
        cache.reorder_cache(torch.tensor([1, 0]))
        model(prompt[:, :1], **{cache_name(model): cache})
    assert choices.experts.shape[1:3] == (2, 6)
