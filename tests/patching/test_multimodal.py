"""Models that take images: LLaVA around every text family, its other wrappers, and the families that come whole."""

import contextlib
import json

import pytest
import torch
from models import assert_folded, gradients, move_graphs
from multimodal import (
    NO_LABEL,
    TEXTS,
    WRAPPERS,
    Recorder,
    auto_class,
    for_generation,
    image_batch,
    other_image,
    routers_by_name,
    stock_model,
    weight_name,
)
from naive_graphs import naive_transition
from safetensors.torch import load_file

from symphony_hf import (
    SymphonyWarning,
    add_router_losses,
    expert_graphs,
    export_folded,
    is_symphonized,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.checkpoints.marks import unmark
from symphony_hf.experiments.conformance.batches import tiny_batch
from symphony_hf.experiments.conformance.tiny import moe_families, why_not_built
from symphony_hf.patching.attachment import tracker_of

WHOLE = ["aria", "ernie4_5_vl_moe", "gemma4", "glm4v_moe", "llama4", "minimax_m3_vl", "qwen3_5_moe", "qwen3_vl_moe"]
MORE = [
    "deepseek_ocr2",
    "dots3_note",
    "glm5_next",
    "inkling2",
    "inkling_mm_model",
    "mistral_large4",
    "muse_spark",
    "qwen3_omni_moe_thinker",
    "qwen4_exp",
    "step3p7",
    "unlimited_ocr",
]
# A wrapper acts before the text model, whatever its family is.
WRAPPED = [*(f"llava+{text}" for text in TEXTS), *(f"{wrapper}+olmoe" for wrapper in WRAPPERS if wrapper != "llava")]
ONE_EXPERT_PER_TOKEN = {"llama4"}
WEIGHTS = {"balance_loss_weight": 0.5, "z_loss_weight": 0.25}
DECAY = 0.9
SPECIAL_TOKENS = list(range(96, 128))


@pytest.fixture(params=[*WRAPPED, *WHOLE, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def case(request):
    if "+" not in request.param and request.param not in moe_families():
        pytest.skip("not in the installed transformers")
    if reason := why_not_built(request.param):
        pytest.skip(reason)
    return request.param


# tests/experiments/test_matrix.py does the same for every family that comes whole.
one_whole = pytest.mark.parametrize("case", [*WRAPPED, "qwen3_vl_moe"], indirect=True)

RTOL, ATOL = 1e-3, 1e-5  # of gradients: float32 sums in another order, through a vision tower and four layers


def symphonized(case, **settings):
    no_warning = contextlib.nullcontext()
    with pytest.warns(SymphonyWarning, match="no effect") if case in ONE_EXPERT_PER_TOKEN else no_warning:
        return symphonize(stock_model(case), **settings)


def train_forward(model, batch):
    torch.manual_seed(0)  # PhiMoE draws its experts while it trains
    return model.train()(**batch)


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def aligned(model):
    """The same weights, out of the mapped file: off the 16 bytes, a stock model's experts, too, round otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def smoothed_weights(stock, graphs):
    """Each router's A W, one expert at a time, as functions of the weights of a plain model."""
    weights = {}
    for name, router in routers_by_name(stock).items():
        matrix = naive_transition(graphs[name].tolist(), strength=1.0)
        weight = router.get_parameter(weight_name(router))
        size = len(matrix)
        rows = [sum(matrix[j, k] * weight[k] for k in range(size)) for j in range(size)]
        rows += list(weight[size:])  # of experts that every token runs
        weights[f"{name}.{weight_name(router)}"] = torch.stack(rows)
    return weights


def kept_tokens(name, batch):
    """Which of the tokens that a router sees are no padding. None: it sees no text, and no padding."""
    mask = batch["attention_mask"].flatten().bool()
    if ".vision_tower." in name:
        return None
    for kind, of_image in (("text_moe", False), ("vision_moe", True)):
        if f".{kind}." in name:  # each router of ERNIE-VL sees the tokens of one kind
            return mask[(batch["moe_mm_token_type_ids"].flatten() != 0) == of_image]
    return mask


def naive_losses(logits_TE, chosen_TK, kept_T):
    """(balance, z) of one router by the papers' formulas, token by token."""
    tokens = [t for t in range(len(logits_TE)) if kept_T is None or kept_T[t]]
    num_experts = logits_TE.shape[1]
    share = torch.zeros(num_experts)
    for t in tokens:
        for expert in chosen_TK[t].tolist():
            share[expert] += 1 / len(tokens)
    probability = sum(logits_TE[t].softmax(-1) for t in tokens) / len(tokens)
    z = sum(logits_TE[t].logsumexp(-1) ** 2 for t in tokens) / len(tokens)
    return num_experts * (share * probability).sum(), z


def reference_gradients(case, graphs, batch, balance_loss_weight=0.0, z_loss_weight=0.0):
    """Of cross-entropy plus weighted router losses, averaged over routers, on a plain model routed with A W."""
    stock = stock_model(case).train()
    recorder = Recorder(stock, routers_by_name(stock))
    torch.manual_seed(0)
    loss = torch.func.functional_call(stock, smoothed_weights(stock, graphs), (), batch).loss
    names = list(routers_by_name(stock))
    if balance_loss_weight or z_loss_weight:
        for name in names:
            size = len(graphs[name])
            balance, z = naive_losses(
                recorder.logits[name].reshape(-1, recorder.logits[name].shape[-1])[:, :size],
                recorder.chosen_by(name),
                kept_tokens(name, batch),
            )
            loss = loss + (balance_loss_weight * balance + z_loss_weight * z) / len(names)
    loss.backward()
    return gradients(stock)


def assert_close(name, actual, expected, **tolerances):
    torch.testing.assert_close(actual, expected, **tolerances, msg=lambda message: f"{name}: {message}")


def assert_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, actual[name], gradient, rtol=RTOL, atol=ATOL)


@one_whole
def test_right_after_symphonize_it_is_the_base_bit_for_bit(case):
    stock, batch = stock_model(case), image_batch(case, padded=True)
    model = symphonized(case)
    for images in (batch, other_image(batch)):
        assert torch.equal(logits(model, images), logits(stock, images))
    assert set(expert_graphs(model)) == set(routers_by_name(stock))


@pytest.mark.thorough
def test_a_graph_acts_as_naive_smoothing(case):
    stock, batch = stock_model(case), image_batch(case, padded=True)
    base = logits(stock, batch)
    model = move_graphs(symphonized(case))
    recorder = Recorder(model, routers_by_name(stock))
    ours = logits(model, batch)
    assert not torch.allclose(ours, base, atol=1e-3)
    smoothed = smoothed_weights(stock, expert_graphs(model))
    for name, router in routers_by_name(stock).items():
        args, kwargs = recorder.inputs[name]
        weights = {weight_name(router): smoothed[f"{name}.{weight_name(router)}"]}
        with torch.no_grad():
            expected = torch.func.functional_call(router, weights, args, kwargs)
        # Sums of 8 weights in another order: a few float32 ulps.
        assert_close(name, recorder.outputs[name], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = torch.func.functional_call(stock, smoothed, (), batch).logits
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)  # the same, through four layers


@pytest.mark.thorough
def test_the_router_losses_reach_every_gradient_once(case):
    batch = image_batch(case, padded=True)
    model = move_graphs(symphonized(case, **WEIGHTS))
    train_forward(model, batch).loss.backward()
    without = move_graphs(symphonized(case, balance_loss_weight=0, z_loss_weight=0))
    train_forward(without, batch).loss.backward()
    graphs = expert_graphs(model)
    expected = reference_gradients(case, graphs, batch, **WEIGHTS)
    assert_gradients(gradients(without), reference_gradients(case, graphs, batch))
    assert_gradients(gradients(model), expected)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    for name, router in routers_by_name(stock_model(case)).items():
        parameter = f"{name}.{weight_name(router)}"
        # So that twice, or not at all, could not pass: far above the tolerances.
        difference = (expected[parameter] - gradients(without)[parameter]).abs().max()
        assert difference > 20 * (ATOL + RTOL * expected[parameter].abs().max()), name


@pytest.mark.thorough
def test_the_router_losses_follow_num_items_in_batch(case):
    """Trainer passes it, of the whole optimizer step, and models divide by it in place of their own tokens."""
    batch = image_batch(case, padded=True)
    whole, part = symphonized(case, **WEIGHTS), symphonized(case, **WEIGHTS)
    loss_of_whole = train_forward(whole, batch).loss
    loss_of_part = train_forward(part, batch | {"num_items_in_batch": torch.tensor(100)}).loss
    loss_of_whole.backward()
    loss_of_part.backward()
    share = float((loss_of_part / loss_of_whole).detach())
    assert share < 1
    assert_gradients(gradients(part), {name: share * gradient for name, gradient in gradients(whole).items()})


@pytest.mark.thorough
def test_the_returned_loss_is_the_cross_entropy_alone(case):
    batch = image_batch(case, padded=True)
    stock = stock_model(case)
    plain = train_forward(stock, batch).loss
    model = symphonized(case)
    assert torch.equal(train_forward(model, batch).loss, plain)
    with_own = None
    # LLaVA's outputs have no place for router logits from transformers 5.24 on.
    with contextlib.suppress(*([TypeError] if "+" in case else [])):
        with_own = train_forward(stock, batch | {"output_router_logits": True}).loss
    if with_own is None:
        return
    own_is_added = not torch.equal(with_own, plain)
    assert own_is_added or case not in ("ernie4_5_vl_moe", "qwen3_5_moe", "qwen3_vl_moe")
    assert not (own_is_added and "+" in case)  # transformers leaves it out around LLaVA's text model
    weight = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    assert torch.equal(train_forward(model, batch | {"output_router_logits": True}).loss, plain)
    assert getattr(model.config.get_text_config(), "router_aux_loss_coef", None) == weight
    assert weight != 0
    unsymphonize(model)
    assert torch.equal(train_forward(model, batch | {"output_router_logits": True}).loss, with_own)


def test_the_graph_learns_which_experts_met(case):
    batch = image_batch(case, padded=True)
    model = symphonized(case, decay=DECAY)
    start = expert_graphs(model)
    recorder = Recorder(model, start)
    train_forward(model, batch).loss.backward()
    assert update_graphs(model)
    for name, adjacency in expert_graphs(model).items():
        chosen, kept = recorder.chosen_by(name), kept_tokens(name, batch)
        tokens = [experts.tolist() for t, experts in enumerate(chosen) if kept is None or kept[t]]
        counts = torch.zeros_like(adjacency)
        for experts in tokens:
            for j in experts:
                for k in experts:
                    counts[j, k] += 1
        expected = DECAY * start[name] + (1 - DECAY) * counts / len(tokens)
        # One multiplication and addition in another order: one float32 ulp.
        assert_close(name, adjacency, expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(adjacency, start[name])
    if case in ONE_EXPERT_PER_TOKEN:
        assert torch.equal(logits(model, batch), logits(stock_model(case), batch))


def greedy_by_hand(model, batch, num_tokens):
    """Append the likeliest word, from the whole text and its images, again and again."""
    batch = dict(batch)
    for _ in range(num_tokens):
        word = logits(model, batch)[:, -1, : SPECIAL_TOKENS[0]].argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], word], dim=1)
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("moe_mm_token_type_ids", 0)):
            if name in batch:
                batch[name] = torch.nn.functional.pad(batch[name], (0, 1), value=value)
    return batch["input_ids"]


@pytest.mark.thorough
def test_generate_with_images(case):
    batch = for_generation(image_batch(case))
    # A random model would else generate the placeholders of images.
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL_TOKENS}
    model = symphonized(case)
    assert torch.equal(model.generate(**batch, **settings), stock_model(case).generate(**batch, **settings))
    move_graphs(model)
    generated = model.generate(**batch, **settings)
    assert generated.shape[1] == batch["input_ids"].shape[1] + 4
    if case != "mistral_large4":  # whose sparse attention, in a stock model too, sees other words with a cache
        assert torch.equal(generated, greedy_by_hand(model, batch, 4))


@pytest.mark.thorough
@one_whole
def test_save_and_load(case, tmp_path):
    batch = image_batch(case, padded=True)
    model = move_graphs(symphonized(case))
    model.save_pretrained(tmp_path / "ours")
    stock_model(case).save_pretrained(tmp_path / "stock")
    loaded, info = auto_class(case).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert torch.equal(logits(aligned(loaded), batch), logits(model, batch))
    assert expert_graphs(loaded).keys() == expert_graphs(model).keys()
    for name, adjacency in expert_graphs(model).items():
        assert torch.equal(expert_graphs(loaded)[name], adjacency)
    ours, stock = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "stock"))
    assert ours["model_type"] == "symphony_hf"
    ours = unmark(ours, "config.json")
    for name in ("symphony", "architectures", "auto_map"):
        ours.pop(name, None)
        stock.pop(name, None)
    for part in (*ours.values(), *stock.values()):
        if isinstance(part, dict):
            part.pop("symphony", None)  # so that the language model can be loaded alone, with its graphs
            part.pop("architectures", None)  # and saved as a Symphony model's
            if part.get("dtype") is None:
                part.pop("dtype", None)
    assert ours == stock  # the weight of the model's own balance loss, too


@pytest.mark.thorough
@one_whole
@pytest.mark.filterwarnings("ignore:export_folded. `norm_topk_prob`")  # llama.cpp takes another for qwen3_moe
def test_the_folded_export_is_a_stock_checkpoint(case, tmp_path):
    batch = image_batch(case, padded=True)
    model = move_graphs(symphonized(case))
    stock_model(case).save_pretrained(tmp_path / "stock")
    export_folded(model, tmp_path / "folded")
    stock, folded = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "folded"))
    assert {n: (t.shape, t.dtype) for n, t in folded.items()} == {n: (t.shape, t.dtype) for n, t in stock.items()}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "folded")]
    assert configs[0] == configs[1]
    plain, info = auto_class(case).from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not is_symphonized(plain)
    assert type(plain) is type(stock_model(case))
    assert_folded(logits(aligned(plain), batch), logits(model, batch))


@one_whole
def test_unsymphonize_restores_everything(case):
    stock, batch = stock_model(case), image_batch(case, padded=True)
    model = move_graphs(symphonized(case))
    assert not torch.equal(logits(model, batch), logits(stock, batch))
    unsymphonize(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert model.config.to_dict() == stock.config.to_dict()
    assert torch.equal(logits(model, batch), logits(stock, batch))


@pytest.mark.thorough
def test_text_without_images(case):
    stock = stock_model(case)
    batch = tiny_batch(stock)
    base = logits(stock, batch)
    model = symphonized(case)
    assert torch.equal(logits(model, batch), base)
    start = expert_graphs(model)
    train_forward(model, batch).loss.backward()
    assert update_graphs(model)
    without_tokens = {name for name in start if ".vision_moe." in name or ".vision_tower." in name}
    for name, adjacency in expert_graphs(model).items():
        assert torch.equal(adjacency, start[name]) == (name in without_tokens), name
    train_forward(model, batch).loss.backward()
    assert update_graphs(model)  # nor does a second step of text alone complain about them


def test_a_batch_of_images_is_labelled_on_its_text(case):
    """The tests above mean nothing where a row has no image, no text to learn, or no padding."""
    batch = image_batch(case, padded=True)
    assert batch["pixel_values"].abs().max() > 0
    assert (batch["labels"] != NO_LABEL).any(1).all()
    assert batch["attention_mask"].sum() == batch["attention_mask"].numel() - 3
    stock = stock_model(case)
    found, other = (logits(stock, images)[:, -4] for images in (batch, other_image(batch)))
    assert not torch.allclose(found, other, atol=1e-3)  # the image is seen by the text after it


@pytest.mark.parametrize("case", ["gemma4", "llava+olmoe"], indirect=True)
def test_a_loop_that_calls_the_inner_model_leaves_padding_out(case):
    """Gemma 4 makes the masks of its text model one level above it."""
    model, batch = symphonized(case, decay=0.5).train(), image_batch(case)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, -3:] = 0
    del batch["labels"]
    add_router_losses(model, model.model(**batch).last_hidden_state.square().mean()).backward()
    state = tracker_of(model).state
    kept = {float(number) for pending in state.pending.values() for number in pending.tokens_L}
    assert kept == {float(batch["attention_mask"].sum())}
    assert state.masks.find("attention_mask") is None
