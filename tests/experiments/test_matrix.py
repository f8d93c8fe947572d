"""Every MoE family of the installed transformers against every behaviour; a new family is a new row by itself."""

import copy
import re
import types
from functools import cache

import pytest
import torch
from pages import FAMILIES, block
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from symphony_hf import ConfigError, SymphonyConfig, UnsupportedModelError, is_symphonized, symphonize
from symphony_hf.compat import transformers_version
from symphony_hf.experiments.conformance.batches import tiny_batch
from symphony_hf.experiments.conformance.checks import CHECKS
from symphony_hf.experiments.conformance.matrix import (
    FamilyResult,
    check_family,
    inspect_family,
    quiet,
    run_check,
    run_matrix,
)
from symphony_hf.experiments.conformance.overrides import BROKEN, OVERRIDES
from symphony_hf.experiments.conformance.specimen import ConformanceError, Specimen
from symphony_hf.experiments.conformance.table import list_families, summary, table_row, write_readme
from symphony_hf.experiments.conformance.tiny import auto_class_of, moe_families, shrink, tiny_model, why_not_built
from symphony_hf.patching.families.capability import Supported
from symphony_hf.patching.families.discovery import find_routers
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.replay.hooks import RoutedForward
from symphony_hf.patching.self_check import check_routers
from symphony_hf.patching.symphonize import symphony_routers

BUILT = [family for family in moe_families() if not why_not_built(family)]
REFUSED = {"doge": "product keys", "diffusion_gemma": "shares its weight"}
SYMPHONIZED = [family for family in BUILT if family not in REFUSED]
EXAMPLES = {
    *("mixtral", "olmoe", "granitemoe"),  # a softmax
    *("deepseek_v3", "llama4_text"),  # a sigmoid, groups, a correction bias
    *("gpt_oss", "dbrx"),  # a bias, the block's choice
    *("switch_transformers", "qwen3_vl_moe", *REFUSED),  # an encoder, images
}
"""Families of each form of router, which the default run checks."""


@cache
def specimen_of(family):
    specimen_of.cache_clear()  # one at a time
    with quiet():
        return Specimen(family)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "family",
    [
        pytest.param("phimoe", marks=pytest.mark.thorough),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama4_text", "gemma4_text", "hunyuan_v1_moe")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's and transformers' own, of compiling
def test_compiled_evaluation_is_the_same(family):
    """PhiMoE samples its experts in training: a router that took itself for training would choose others."""
    torch._dynamo.reset()
    with quiet():
        model = Specimen(family).patched.eval()
        if family == "phimoe":
            model.set_experts_implementation("batched_mm")
        batch = {name: value for name, value in specimen_of(family).batch.items() if name != "labels"}
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, use_cache=False).logits
            # Float32 sums that the compiler orders otherwise.
            torch.testing.assert_close(compiled, model(**batch).logits, rtol=1e-4, atol=1e-5)


TRUE_SHAPES = {
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {"num_experts": 512, "num_experts_per_tok": 8, "hidden_size": 4096},
    "deepseek_v3": {},
    "gpt_oss": {},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8, "head_dim": 128},
    "llama4_text": {},
    "longcat_flash": {},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 64},
    "zaya": {},
}


TRUE_SIZES = [(family, torch.float32) for family in TRUE_SHAPES]
TRUE_SIZES += [(family, torch.bfloat16) for family in ("mixtral", "deepseek_v3")]


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "dtype"), TRUE_SIZES, ids=str)
def test_routers_of_true_size_pass_the_self_check(family, dtype):
    """The self-check before a large model is patched, without its weights."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TRUE_SHAPES[family]), dtype=dtype)
    found = find_routers(model)
    assert len({router.contract for router in found}) == 1
    assert found[0].contract.num_experts >= 8
    for smoothing in ("logits", "scores"):
        check_routers(found, SymphonyConfig(smoothing=smoothing))


@pytest.mark.parametrize("family", [family for family in REFUSED if family in BUILT])
def test_refused_families_say_why_and_stay_as_they_are(family):
    with quiet():
        model = tiny_model(family)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        symphonize(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", [f for f in BROKEN if f in moe_families() and why_not_built(f)])
def test_broken_mutations_are_broken(family):
    with quiet():
        config = shrink(CONFIG_MAPPING[family], OVERRIDES.get(family, {}))
        model = auto_class_of(family).from_config(config)
        with pytest.raises((AttributeError, TypeError)):
            model(**tiny_batch(model))


def table_of_page():
    lines = block(FAMILIES, "families table").splitlines()
    rows = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    version = re.match(r"transformers ([\d.]+):", lines[0]).group(1)
    return version, lines[0], rows


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in EXAMPLES else pytest.mark.thorough) for name in moe_families()]
)
def test_matrix(family):
    """Every check passes, and the page has the same row; if it is of another transformers, the same verdict."""
    version, _, rows = table_of_page()
    row = check_family(family)
    if family in SYMPHONIZED:
        assert row.results.keys() == CHECKS.keys()
    assert not row.failures, table_row(row)[-1]
    if version == transformers_version():
        assert rows[family] == f"| {' | '.join(table_row(row))} |"
    elif family in rows and "| yes |" in rows[family] and not why_not_built(family):
        assert isinstance(row.able.logits, Supported)


def test_the_page_has_no_row_too_many():
    version, sentence, rows = table_of_page()
    if version == transformers_version():
        assert list(rows) == moe_families()
        refused = sum(family in BUILT for family in REFUSED)
        assert f"{len(rows)} model types" in sentence
        assert f"{len(SYMPHONIZED)} checked (nothing fails), {refused} refused" in sentence


def test_no_family_is_lost():
    """Found by their source; the well-known ones must be among them, whatever moves."""
    known = {"mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "llama4_text", "zaya"}
    assert known <= set(SYMPHONIZED)
    assert len(moe_families()) >= 70


def sabotaged(specimen, spoil):
    """A specimen whose symphonized copies are spoiled: the checks must see it."""
    symphonized = specimen.symphonized
    spoiled = copy.copy(specimen)
    spoiled.__dict__.pop("patched", None)
    spoiled.__dict__.pop("reference", None)

    def symphonize_and_spoil(**settings):
        model = symphonized(**settings)
        spoil(model)
        return model

    spoiled.symphonized = symphonize_and_spoil
    return spoiled


def change_forward(change):
    def spoil(model):
        for _, router in symphony_routers(model):
            forward = router.forward
            router.forward = types.MethodType(lambda self, *args, forward=forward: change(forward(*args)), router)

    return spoil


def change_weights(model):
    for _, router in symphony_routers(model):
        linear_of(router, router.contract.linear).weight.data.mul_(1.001)


def change_the_graph(model):
    for _, router in symphony_routers(model):
        router.smooth_logits = lambda logits: 1.001 * logits


def lose_the_losses(model):
    for _, router in symphony_routers(model):
        observe = router.stack.observe
        router.stack.observe = lambda *args, observe=observe: (observe(*args), None)[1]


def count_wrongly(model):
    for _, router in symphony_routers(model):
        observe = router.stack.observe
        router.stack.observe = lambda r, logits, indices, observe=observe: observe(r, logits, indices.flip(0).roll(1))


def shift_the_choices(model):
    for _, router in symphony_routers(model):
        observe = router.stack.observe
        router.stack.observe = lambda r, logits, indices, observe=observe: observe(
            r, logits, (indices + 1) % logits.shape[-1]
        )


def change_the_products(model):
    for _, router in symphony_routers(model):
        others = router.gradient_of_others
        if others is not None:
            others.products = lambda *args, products=others.products: 1.01 * products(*args)


def forget_a_class(model):
    next(symphony_routers(model))[1].__dict__["base_class"] = torch.nn.Identity


def change_routing_weights(model):
    change_forward(lambda output: (output[0], output[1] * 1.01, output[2]))(model)


SPOILED = {
    "identity": (change_weights, "logits differ at the start"),
    "reference": (change_the_graph, "logits against the base with A W, by loops: off"),
    "recorded": (change_forward(lambda output: (output[0] * 1.01, *output[1:])), "recorded logits 0: off"),
    "watched": (None, "not what reached the experts"),
    "replay": (None, "the choices are not those given"),
    "counts": (count_wrongly, "the graph is not the naive count"),
    "gradients": (lose_the_losses, "the router losses have no gradient there"),
    "router gradient": (change_the_products, "gradient of its logits: off"),
    "bias": (shift_the_choices, "its bias is not moved by the naive load"),
    "step balance": (shift_the_choices, "the load is not the naive one of the step"),
    "own loss": (lambda model: model._forward_pre_hooks.clear(), "asked for router logits, its loss is"),
    "bfloat16": (None, "logits differ at the start"),
    "save, load": (change_routing_weights, "logits differ after loading"),
    "fold": (change_routing_weights, "logits, folded: off"),
    "unsymphonize": (change_weights, "logits differ"),
    "generate": (lambda model: model.lm_head.weight.data.neg_(), "the generated tokens differ"),
    "scores": (change_weights, "logits differ at the start"),
    "images": (change_weights, "logits differ at the start"),
}
"""What spoils a copy of a model for each check, and what the check then says."""


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_fail(check, monkeypatch):
    spoil, message = SPOILED[check]
    specimen = specimen_of({"bias": "deepseek_v3", "images": "aria"}.get(check, "mixtral"))
    if check == "bfloat16":
        monkeypatch.setattr("symphony_hf.patching.expert_graph.ExpertGraph._apply", torch.nn.Module._apply)
        cast = Specimen.symphonized
        monkeypatch.setattr(Specimen, "symphonized", lambda self, **s: cast(self, **s).to(torch.bfloat16))
        spoiled = specimen
    elif check == "watched":
        lowest = lambda self, outputs, logits: logits.topk(self.top_k, largest=False).indices  # noqa: E731
        monkeypatch.setattr("symphony_hf.patching.families.RouterContract.chosen_experts", lowest)
        spoiled = specimen
    elif check == "replay":
        monkeypatch.setattr(RoutedForward, "given_to", lambda self, router: None)
        spoiled = specimen
    else:
        spoiled = sabotaged(specimen, spoil)
    with quiet(), pytest.raises(ConformanceError, match=message):
        CHECKS[check](spoiled)


def test_a_failure_is_a_row_that_says_so(tmp_path):
    specimen = sabotaged(specimen_of("mixtral"), change_weights)
    with quiet():
        row = FamilyResult("mixtral", inspect_family("mixtral").able, {"identity": run_check("identity", specimen)})
    assert row.failures == ["identity"]
    assert "**identity fails**: FAILED: logits differ at the start" in table_row(row)[-1]
    assert "1 of them fail something: mixtral" in summary([row])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- families table -->\nold\n<!-- end -->\nafter\n")
    write_readme(page, [row])
    assert page.read_text().startswith("before\n<!-- families table -->\ntransformers ")
    assert page.read_text().endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in page.read_text()


def test_the_base_of_a_specimen_is_never_patched():
    assert not is_symphonized(specimen_of("mixtral").base)


@pytest.mark.parametrize("check", [False, True])
def test_a_family_that_cannot_be_built_is_a_row_and_the_others_follow(check, monkeypatch):
    def build(family, **settings):
        if family == "mixtral":
            raise RuntimeError("a release broke it")
        return tiny_model(family, **settings)

    monkeypatch.setattr("symphony_hf.experiments.conformance.matrix.tiny_model", build)
    monkeypatch.setattr("symphony_hf.experiments.conformance.specimen.tiny_model", build)
    monkeypatch.setattr("symphony_hf.experiments.conformance.matrix.CHECKS", {"none": lambda specimen: None})
    broken, built = run_matrix(["mixtral", "olmoe"], check)
    assert (broken.not_built, broken.failures) == ("RuntimeError: a release broke it", ["build"] if check else [])
    assert table_row(broken)[2] == "not built"
    assert "RuntimeError: a release broke it" in table_row(broken)[-1]
    assert built.able is not None
    assert built.not_built is None


@pytest.mark.parametrize("page", ["no marks", None])
def test_a_page_without_a_place_for_the_table_is_refused_before_the_checks(page, tmp_path, monkeypatch):
    monkeypatch.setattr("symphony_hf.experiments.conformance.table.run_matrix", lambda *_: pytest.fail("it began"))
    if page is not None:
        (tmp_path / "page.md").write_text(page)
    with pytest.raises(ConfigError, match=r"symphony families: --readme: .*page\.md` "):
        list_families(check=True, readme=str(tmp_path / "page.md"))
