"""`balance="bias"`: the correction bias moves by the sign of each expert's missing load, at each graph update."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import make_ids, make_model
from packaging.version import Version

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyConfig,
    export_folded,
    load_adapter,
    lora_config,
    symphonize,
    update_graphs,
)
from symphony_hf.config import settings_of
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.naive import naive_counts, watch_choices
from symphony_hf.experiments.conformance.tiny import moe_families, tiny_model
from symphony_hf.patching.correction_bias import correction_bias, move_bias
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.symphonize import all_routers
from symphony_hf.training.callback import refuse_vllm
from symphony_hf.training.reference_model import mix_graphs

# In the router, given by the block, in a child of the router, a parameter, of logits, and in groups.
FAMILIES = ("deepseek_v3", "minimax_m2", "ernie4_5_moe", "laguna", "kolibri1", "glm4_moe", "lfm2_moe", "longcat_flash")


@pytest.fixture(params=FAMILIES)
def model(request):
    if request.param not in moe_families():
        pytest.skip("this transformers does not have the family")
    if request.param == "longcat_flash" and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("the probe does not find this family's bias in older transformers, so it is refused there")
    with quiet():
        return tiny_model(request.param)


def biases_of(model):
    modules = dict(model.named_modules())
    return {
        router.name: correction_bias(router.contract, router.module, modules[router.name.rpartition(".")[0]])
        for router in all_routers(model)
    }


@pytest.mark.parametrize("saved", [SymphonyConfig(balance="bias"), SymphonyConfig(balance="bias").to_dict()])
def test_a_loss_in_place_of_the_bias_has_the_default_weight(saved):
    default = SymphonyConfig().balance_loss_weight
    for given, weight in (({}, default), ({"balance_loss_weight": 0.5}, 0.5), ({"balance_loss_weight": 0.0}, 0.0)):
        settings = settings_of(saved, None, {"balance": "loss", **given})
        assert (settings.balance, settings.balance_loss_weight) == ("loss", weight)
    assert settings_of(saved, None, {"strength": 0.5}).balance_loss_weight == 0


@pytest.mark.filterwarnings("ignore")
def test_each_commit_moves_the_bias_by_the_naive_loads(model):
    """The loads of two micro-batches, one with padding. The buffer is the stock model's, in place."""
    symphonize(model, balance="bias", bias_rate=0.125, z_loss_weight=0.0)
    before = {name: bias.clone() for name, bias in biases_of(model).items()}
    seen, masks = watch_choices(model), [torch.ones(2, 12).long(), torch.ones(2, 12).long()]
    masks[1][0, :5] = 0
    loads = {name: torch.zeros_like(bias.view(-1)) for name, bias in before.items()}
    for seed, mask in enumerate(masks):
        ids = make_ids(seed=seed)
        model.train()(input_ids=ids, attention_mask=mask).logits.float().square().mean().backward()
        for name, notes in seen.items():
            loads[name] += naive_counts(notes, mask, len(loads[name]))[0].diagonal()
            notes.clear()
    assert update_graphs(model)
    for name, bias in biases_of(model).items():
        wanted = [
            0.125 if load < loads[name].mean() else -0.125 if load > loads[name].mean() else 0.0 for load in loads[name]
        ]
        torch.testing.assert_close((bias - before[name]).view(-1), torch.tensor(wanted))
    assert not update_graphs(model)


@pytest.mark.filterwarnings("ignore")
def test_the_bias_is_saved_and_exported_as_the_stock_buffer(tmp_path):
    with quiet():
        model = symphonize(tiny_model("deepseek_v3"), balance="bias", bias_rate=0.125)
    ids = make_ids()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    update_graphs(model)
    moved = biases_of(model)
    assert all(bias.abs().max() > 0 for bias in moved.values())
    model.save_pretrained(tmp_path / "saved")
    export_folded(model, tmp_path / "folded")
    for name in ("saved", "folded"):
        loaded = type(model).from_pretrained(tmp_path / name)
        assert all(torch.equal(bias, moved[router]) for router, bias in biases_of(loaded).items())
        assert (getattr(loaded.config, "symphony", None) or {}).get("balance") == ("bias" if name == "saved" else None)


def test_an_expert_without_load_is_raised_until_it_gets_some():
    bias, load = torch.zeros(4), torch.tensor([3.0, 0.0, 1.0, 0.0])
    move_bias(bias, load, 0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    move_bias(bias, torch.full((4,), torch.nan), 0.5)  # after non-finite logits
    move_bias(bias, torch.zeros(4), 0.5)  # without any token
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_families_without_a_bias_refuse_it_and_stay_as_they_are():
    model = make_model("mixtral")
    with pytest.raises(ConfigError, match=r"`model\.layers\.0\.mlp\.gate` chooses by its scores alone"):
        symphonize(model, balance="bias")
    assert not any(hasattr(module, "symphony") for module in model.modules())
    for family, has_bias in (("gpt_oss", False), ("gemma4_text", False), ("dots1", True)):
        with quiet():
            routers = find_routers(tiny_model(family))
        assert {router.contract.correction_bias is not None for router in routers} == {has_bias}


def test_a_bias_that_was_cast_is_refused():
    with quiet():
        model = tiny_model("deepseek_v3")
    half = copy.deepcopy(model)
    for _, buffer in half.named_buffers():
        buffer.data = buffer.data.bfloat16()
    with pytest.raises(PatchError, match=r"is torch.bfloat16 with .* keep it in float32"):
        symphonize(half, balance="bias")


def test_it_takes_the_place_of_the_balance_loss():
    config = SymphonyConfig(balance="bias")
    assert config.balance_loss_weight == 0
    assert config.balances
    assert SymphonyConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="`balance_loss_weight` needs balance `loss`"):
        SymphonyConfig(balance="bias", balance_loss_weight=0.02)
    with pytest.raises(ConfigError, match="`balance` is 'biases'"):
        SymphonyConfig(balance="biases")


def adapted(family, **settings):
    peft = pytest.importorskip("peft")
    with quiet():
        model = symphonize(tiny_model(family), balance="bias", bias_rate=0.125)
    config = (
        lora_config(model, **settings)
        if settings
        else peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["symphony"])
    )
    return peft.get_peft_model(model, config).train()


def train_a_step(model):
    ids = make_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    return update_graphs(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "modes", "remedy"),
    [
        ("glm4_moe", ["graph"], "router='train'"),
        ("minimax_m2", ["graph", "train"], r"modules_to_save=\['mlp'\]"),
    ],
)
def test_an_adapter_that_does_not_hold_the_bias_is_refused(family, modes, remedy):
    """In MiniMax-M2 the block holds it, in GLM-4 the router. It would move in the base, and not be saved."""
    complaint = rf"correction_bias` of .* is not in the adapter.*{remedy}"
    for router in modes:
        with pytest.raises(ConfigError, match=rf"lora_config: .*{complaint}"):
            adapted(family, router=router)
    model = adapted(family)
    before = [bias.clone() for bias in biases_of(model).values()]
    with pytest.raises(PatchError, match=rf"balance='bias': .*{complaint}"):
        train_a_step(model)
    assert all(torch.equal(a, b) for a, b in zip(before, biases_of(model).values(), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "settings"), [("glm4_moe", {"router": "train"}), ("minimax_m2", {"modules_to_save": ["mlp"]})]
)
def test_an_adapter_that_holds_the_bias_moves_its_own(family, settings, tmp_path):
    model = adapted(family, **settings)
    before = [bias.clone() for bias in biases_of(model).values()]
    assert train_a_step(model)
    moved = [bias.clone() for bias in biases_of(model).values()]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    with model.disable_adapter():
        assert all(torch.equal(a, b) for a, b in zip(before, biases_of(model).values(), strict=True))
    model.save_pretrained(tmp_path)
    with quiet():
        loaded = load_adapter(tiny_model(family), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(moved, biases_of(loaded).values(), strict=True))


def test_vllm_is_refused_where_a_bias_moves_without_a_graph_too():
    with quiet():
        model = symphonize(tiny_model("glm4_moe"), balance="bias", strength=0)
    with pytest.raises(PatchError, match="without the correction biases"):
        refuse_vllm(SimpleNamespace(use_vllm=True), model._symphony_tracker, "SymphonyCallback")


def test_a_synced_reference_gets_the_bias():
    with quiet():
        policy, reference = (symphonize(tiny_model("glm4_moe"), balance="bias") for _ in range(2))
    for bias, target in zip(biases_of(policy).values(), biases_of(reference).values(), strict=True):
        bias.fill_(1.0), target.zero_()
    args = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.25)
    for step, wanted in ((1, 0.0), (2, 0.25)):
        mix_graphs(args, SimpleNamespace(global_step=step), policy, reference)
        assert all((bias == wanted).all() for bias in biases_of(reference).values())


def test_a_bias_that_was_cast_later_is_refused_before_a_graph_moves():
    with quiet():
        model = symphonize(tiny_model("deepseek_v3"), balance="bias", decay=0.5).train().bfloat16()
    ids = make_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    routers = [module for module in model.modules() if hasattr(module, "symphony")]
    for _ in range(2):
        with pytest.raises(PatchError, match=r"is torch.bfloat16 with .* keep it in float32"):
            update_graphs(model)
        for router in routers:
            assert router.symphony.updates == 0
            assert not router.symphony.adjacency.fill_diagonal_(0).any()
