"""Smaller models: the parts of each tensor, and their outputs."""

import json

import pytest
import torch
from models import make_ids, make_model
from naive_experts import EXPERT, FAMILIES, ROUTE, inputs_of, parts

from symphony_hf.conversion.compression.layers import expert_layers
from symphony_hf.conversion.compression.rebuild import NewExpert, kept, with_fewer_experts, with_top_k
from symphony_hf.experiments.conformance.tiny import tiny_model

KEPT = [0, 3, 4, 6]  # two of each group, of the family that has two groups


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=make_ids() if ids is None else ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_experts_as_before_are_the_same_bits(family):
    model = tiny_model(family)
    layers = expert_layers(model)
    same = with_fewer_experts(model, layers, [kept(range(8)) for _ in layers])
    state = model.state_dict()
    assert {name: tensor.tolist() for name, tensor in same.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert same.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("family", sorted(EXPERT))
def test_a_pruned_block_is_the_naive_one_of_the_experts_that_are_left(family):
    model = tiny_model(family)
    layers = expert_layers(model)
    smaller = with_fewer_experts(model, layers, [kept(KEPT) for _ in layers])
    blocks = [layer.block for layer in layers]
    for block, (inputs, outputs) in zip(blocks, inputs_of(smaller, blocks, make_ids()), strict=True):
        router, experts = parts(family, model.get_submodule(block))
        with torch.no_grad():
            naive = [
                sum(weight * EXPERT[family](experts, expert, x) for expert, weight in ROUTE[family](router, x, KEPT))
                for x in inputs
            ]
        torch.testing.assert_close(outputs, torch.stack(naive), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe"])
def test_experts_that_are_never_chosen_are_not_missed(family):
    """This holds in families whose weights do not depend on the scores of experts that are not chosen."""
    model, never = tiny_model(family), [1, 5]
    layers = expert_layers(model)
    ids = make_ids(2, 10)
    with torch.no_grad():
        for layer in layers:
            router = layer.router.module
            bias = getattr(router, "e_score_correction_bias", getattr(router, "bias", None))
            if bias is not None:
                bias[never] = -100.0
                continue
            # Fewer tokens than dimensions: some row gives all of them this logit.
            (inputs, _), linear = inputs_of(model, [layer.block], ids)[0], router
            solution = torch.linalg.lstsq(inputs.double(), torch.full((len(inputs), 2), -50.0).double()).solution
            linear.weight[never] = solution.T.float()
    smaller = with_fewer_experts(model, layers, [kept([0, 2, 3, 4, 6, 7]) for _ in layers])
    # To float32 rounding: a router of six rows may be multiplied in another order than one of eight.
    torch.testing.assert_close(logits(smaller, ids), logits(model, ids), rtol=1e-5, atol=2e-6)
    missed = with_fewer_experts(model, layers, [kept([1, 3, 4, 5, 6, 7]) for _ in layers])
    assert (logits(missed, ids) - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tensors_by_hand(family):
    model = tiny_model(family)
    layers = expert_layers(model)
    plan = [NewExpert((0, 2), (0.75, 0.25)), NewExpert((1,), (1.0,)), NewExpert((4, 5, 6), (0.5, 0.25, 0.25))]
    plan.append(NewExpert((7,), (1.0,)))
    smaller = with_fewer_experts(model, layers, [plan for _ in layers])
    old, changed = model.state_dict(), []
    for name, tensor in smaller.state_dict().items():
        if tensor.shape == old[name].shape:
            assert torch.equal(tensor, old[name])
            continue
        changed.append(name.rpartition(".")[2])
        e = old[name]
        by_hand = [0.75 * e[0] + 0.25 * e[2], e[1], 0.5 * e[4] + 0.25 * e[5] + 0.25 * e[6], e[7]]
        torch.testing.assert_close(tensor, torch.stack(by_hand))
        assert torch.equal(tensor[1], e[1])
    biases = {"deepseek_v3": {"e_score_correction_bias"}, "gpt_oss": {"bias", "gate_up_proj_bias", "down_proj_bias"}}
    assert set(changed) == {"weight", "gate_up_proj", "down_proj"} | biases.get(family, set())


def test_twins_merged_compute_what_they_did():
    """Each expert is there twice, with its router row: top-2 takes both at half the weight; merged, top-1 takes one."""
    model = make_model("mixtral")
    layers = expert_layers(model)
    with torch.no_grad():
        for layer in layers:
            for tensor in (layer.router.module.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
                tensor[1::2] = tensor[::2]
    plan = [NewExpert((2 * pair, 2 * pair + 1), (0.3, 0.7)) for pair in range(3)]
    merged = with_fewer_experts(model, layers, [plan for _ in layers])
    single = with_top_k(merged, expert_layers(merged), 1)
    torch.testing.assert_close(logits(single), logits(model), rtol=1e-4, atol=1e-5)


def test_a_smaller_top_k_is_the_config_alone():
    model = tiny_model("qwen3_moe")
    single = with_top_k(model, expert_layers(model), 1)
    assert single.config.num_experts_per_tok == 1
    assert model.config.num_experts_per_tok == 2
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in single.state_dict().items()} == pointers
    assert not torch.equal(logits(single), logits(model))


@pytest.mark.thorough
def test_plain_transformers_loads_them(tmp_path, plain_python):
    """A process that does not import this package computes the same logits."""
    expected = {}
    for family in FAMILIES:
        model = tiny_model(family)
        layers = expert_layers(model)
        smaller = with_fewer_experts(model, layers, [kept(KEPT) for _ in layers])
        smaller.save_pretrained(tmp_path / family)
        expected[family] = logits(smaller)[:, -1]
    script = (
        "import json, pathlib, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids, found = torch.tensor(json.loads(sys.argv[2])), {}\n"
        "for folder in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)\n"
        "    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "    with torch.no_grad():\n"
        "        found[folder.name] = model(input_ids=ids, use_cache=False).logits[:, -1].tolist()\n"
        "assert 'symphony_hf' not in sys.modules\n"
        "print(json.dumps(found))"
    )
    found = json.loads(plain_python(script, tmp_path, json.dumps(make_ids().tolist())))
    assert found.keys() == expected.keys()
    for family, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[family]), values, rtol=0, atol=0)
