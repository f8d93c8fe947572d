"""`symphony balance`: small models trained with each way to balance, and what they are measured by."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from symphony_hf import ConfigError
from symphony_hf.experiments.balancing import study, training
from symphony_hf.experiments.balancing.domains import SCRIPT, VOCAB, Domain, draw, two_domains
from symphony_hf.experiments.balancing.training import _SIZES, FAMILIES, LENGTH, ROWS, train_and_measure


@pytest.fixture
def domains():
    """Two domains that share no character."""
    texts = {name: torch.randint(first, first + 40, (2000,)) for name, first in (("low", 1), ("high", 60))}
    return {name: Domain(text[:1500], text[1500:]) for name, text in texts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_violation_is_that_of_the_chosen_experts(family, domains):
    """One step of two micro-batches, with the stock model's router counted by hooks."""
    settings = {"balance_loss_weight": 0.0}
    sizes = {"seed": 3, "steps": 1, "micro_batches": 2}
    values = train_and_measure(family, settings, domains, **sizes)
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **_SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    loads = torch.zeros(2, 8)
    for layer, block in enumerate(model.model.layers):

        def count(module, args, layer=layer):
            loads[layer] += args[1].flatten().bincount(minlength=8)

        block.mlp.experts.register_forward_pre_hook(count)
    generator = torch.Generator().manual_seed(3)
    for domain in domains.values():
        model.train()(draw(domain.train, ROWS, LENGTH, generator))
    expected = float((loads.amax(1) / loads.mean(1) - 1).mean())
    assert values["violation"] == values["last_violation"] == pytest.approx(expected, rel=1e-5)
    assert 0 < values["information"] < 1


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_domains_take_turns_over_the_steps(domains, monkeypatch, micro_batches):
    seen = []
    monkeypatch.setattr(training, "draw", lambda text, *rest: (seen.append(text), draw(text, *rest))[1])
    train_and_measure("olmoe", {}, domains, seed=0, steps=2, micro_batches=micro_batches)
    texts = [domain.train for domain in domains.values()]
    trained = [next(i for i, text in enumerate(texts) if text is one) for one in seen if any(one is t for t in texts)]
    assert trained == [0, 1] * micro_batches


def test_experts_can_begin_as_specialists():
    tokens = {name: torch.randint(first, first + 90, (2000,)) for name, first in (("code", 9), ("prose", SCRIPT + 9))}
    domains = {name: Domain(text[:1500], text[1500:]) for name, text in tokens.items()}
    sizes = {"seed": 0, "steps": 1, "micro_batches": 2}
    plain, special = (
        train_and_measure("olmoe", {}, domains, **sizes, specialists=specialists) for specialists in (False, True)
    )
    assert plain["information_before"] < 0.2
    assert special["information_before"] > 0.5


@pytest.mark.thorough
def test_every_way_to_balance_has_a_row(domains, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "two_domains", lambda: domains)
    path = tmp_path / "balance.json"
    result = study.run_balance(path, seeds=2, steps=1, micro_batches=2)
    assert json.loads(path.read_text()) == result
    assert [(row["family"], row["balance"]) for row in result["rows"]] == [
        *(("olmoe", scope) for scope in ("none", "local", "step", "last_step")),
        *((family, balance) for family in study.BIAS_FAMILIES for balance in ("neither", "loss", "bias")),
    ]
    for row in result["rows"]:
        assert row["loss"]["low"] <= row["loss"]["estimate"] <= row["loss"]["high"]
        assert len(row["runs"]) == 2
    study.print_balance(result)
    printed = capsys.readouterr().out
    assert "glm4_moe" in printed
    assert str(path) in printed.replace("\n", "")
    with pytest.raises(ConfigError, match="`steps` must be at least 1, got 0"):
        study.run_balance(path, steps=0)


def test_the_domains_are_of_one_length_and_share_no_token():
    domains = two_domains()
    assert list(domains) == ["code", "prose"]
    assert len({(len(domain.train), len(domain.held_out)) for domain in domains.values()}) == 1
    assert int(domains["code"].train.max()) < SCRIPT <= int(domains["prose"].train.min())
    for domain in domains.values():
        assert int(domain.train.max()) < VOCAB
        assert len(domain.held_out) > 10_000
