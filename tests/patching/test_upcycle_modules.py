"""Modules of a model become mixtures of experts, are saved, and come back by transformers' own classes."""

import copy
import json

import pytest
import torch
from models import VOCAB, assert_folded, gradients, llava_inputs, move_graphs
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    Phi3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import symphony_hf
from symphony_hf import (
    ConfigError,
    PatchError,
    UpcycledMoE,
    UpcycleError,
    expert_graphs,
    export_folded,
    is_symphonized,
    symphonize,
    unsymphonize,
    upcycle_modules,
    update_graphs,
)

PROJECTOR = "*multi_modal_projector"
BOTH = [PROJECTOR, "*vision_tower*.mlp"]


def make_llava(*, seed=0):
    """Phi-3 and CLIP: all dense."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCAB - 1)
    return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
def logits(model, inputs=None):
    return model.eval()(**(inputs or llava_inputs())).logits


@pytest.fixture(scope="module")
def dense():
    return make_llava()


def upcycled(dense, patterns=BOTH, **settings):
    return upcycle_modules(copy.deepcopy(dense), patterns, **settings)


@pytest.mark.parametrize("head", ["smoe", "xmoe"])
def test_the_model_computes_what_it_did(dense, head):
    model = upcycled(dense, head=head)
    assert sum(isinstance(module, UpcycledMoE) for module in model.modules()) == 3
    # Float32 sums in another order, through two layers.
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    again = upcycled(dense, head=head)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    noisy = upcycled(dense, head=head, noise=0.5)
    assert not torch.allclose(logits(noisy), logits(dense), atol=1e-3)


@pytest.mark.parametrize("head", ["smoe", "xmoe"])
def test_it_is_symphonized_saved_loaded_and_folded(dense, head, tmp_path):
    model = symphonize(upcycled(dense, head=head, noise=0.5))
    start = logits(upcycled(dense, head=head, noise=0.5))
    assert torch.equal(logits(model), start)
    move_graphs(model)
    ours = logits(model)
    assert not torch.equal(ours, start)
    model.save_pretrained(tmp_path / "symphony")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "symphony", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), ours)
    export_folded(model, tmp_path / "folded")
    folded = AutoModelForImageTextToText.from_pretrained(tmp_path / "folded")
    assert not is_symphonized(folded)
    assert_folded(logits(folded), ours)
    # Software that does not know of us must not take either for a plain LLaVA.
    for name in ("symphony", "folded"):
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["architectures"] == ["SymphonyLlavaForConditionalGeneration"]


def test_without_graphs_it_is_saved_and_marked_too(dense, tmp_path):
    model = upcycled(dense, noise=0.5)
    unsymphonize(symphonize(model))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0].startswith("Symphony")
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path)), logits(model))
    on_meta = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(isinstance(module, UpcycledMoE) for module in on_meta.modules()) == 3


def naive_pairs(model, inputs):
    """What each router told its experts, by loops."""
    pairs = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, UpcycledMoE):
            matrix = pairs[f"{name}.gate"] = torch.zeros(4, 4)

            def note(_, args, matrix=matrix):
                for chosen in args[1].tolist():
                    for j in chosen:
                        for k in chosen:
                            matrix[j, k] += 1

            handles.append(module.experts.register_forward_pre_hook(note))
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    return pairs


def test_images_are_counted_whole_whatever_the_texts_padding(dense):
    inputs = llava_inputs()
    inputs["attention_mask"][0, -2:] = 0
    model = symphonize(upcycled(dense), decay=0.5)
    wanted = naive_pairs(model, inputs)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert update_graphs(model)
    for name, graph in expert_graphs(model).items():
        num_tokens = wanted[name].diagonal().sum() / 2
        assert num_tokens == (8 if "projector" in name else 10)  # 4 patches an image; the tower has a class token, too
        # Two roundings of numbers below 1.
        torch.testing.assert_close(graph, 0.5 * torch.eye(4) / 2 + 0.5 * wanted[name] / num_tokens, rtol=0, atol=1e-6)


def test_text_alone_moves_no_graph_of_images(dense):
    model = symphonize(upcycled(dense)).train()
    ids = torch.randint(3, VOCAB - 1, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    update_graphs(model)
    assert all(torch.equal(graph, torch.eye(4) / 2) for graph in expert_graphs(model).values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_losses_reach_the_routers_under_checkpointing(dense, reentrant):
    found = []
    for checkpointing in (False, True):
        model = symphonize(upcycled(dense, noise=0.5), balance_loss_weight=0.1, z_loss_weight=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = llava_inputs()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: g for name, g in gradients(model).items() if "projector.gate" in name})
    (gradient,), (with_checkpointing,) = (values.values() for values in found)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(with_checkpointing, gradient, rtol=1e-4, atol=1e-7)


def test_siglip_and_its_encoder_alone():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = SiglipVisionModel(config).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
        after = upcycle_modules(model, "*encoder.layers.*.mlp")(pixels).last_hidden_state
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused_and_nothing_changed(dense):
    before = [type(module) for module in dense.modules()]
    for patterns, settings, kind, message in (
        ("*projectr", {}, UpcycleError, "matches no module"),
        (["*multi_modal_projector", "*self_attn"], {}, UpcycleError, "is not an MLP"),
        (PROJECTOR, {"top_k": 5}, ConfigError, "top-5 of 4"),
        (PROJECTOR, {"head": "smo"}, ConfigError, "did you mean `smoe`"),
        (PROJECTOR, {"noise": -1}, ConfigError, "`noise` must be"),
    ):
        with pytest.raises(kind, match=message):
            upcycle_modules(dense, patterns, **settings)
    assert [type(module) for module in dense.modules()] == before
    assert not hasattr(dense.config, "upcycled")
    model = upcycled(dense, PROJECTOR)
    with pytest.raises(PatchError, match="upcycled already"):
        upcycle_modules(model, "*vision_tower*.mlp")
    with pytest.raises(PatchError, match="upcycle first"):
        upcycle_modules(symphonize(upcycled(dense, PROJECTOR)), "*vision_tower*.mlp")


def test_a_checkpoint_without_its_experts_is_refused(dense, tmp_path):
    model = upcycled(dense)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "projector.experts.down_proj" in name)
    save_file(
        {name: w for name, w in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UpcycleError, match=r"lacks 1 of their weights .*projector\.experts\.down_proj"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 1 was expected"),
        ({"modules": []}, "names of modules"),
        ({"modules": ["model.nothing"]}, "has no module `model.nothing`"),
        ({"num_experts": "4"}, "must be a number of experts"),
        ({"top_k": 9}, "top-9 of 4"),
        ({"head": "linear"}, "`head` is 'linear'"),
        ({"more": 1}, "unknown setting `more`"),
    ],
)
def test_a_bad_record_is_refused(dense, change, message, tmp_path):
    upcycled(dense).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["upcycled"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def phi3_mini_with_clip():
    text = Phi3Config()
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=vision, text_config=text))


PHI3, CLIP = 3_821_079_552, 303_507_456
PROJECTOR_SIZE = (1024 + 1) * 3072 + (3072 + 1) * 3072
CLIP_MLP = (1024 + 1) * 4096 + (4096 + 1) * 1024


@pytest.mark.parametrize(
    ("patterns", "parameters"),
    [
        ([PROJECTOR], PHI3 + CLIP + 4 * PROJECTOR_SIZE + 4 * 1024),
        (BOTH, PHI3 + CLIP + 4 * PROJECTOR_SIZE + 4 * 1024 + 24 * (3 * CLIP_MLP + 4 * 1024)),
    ],
    ids=["4.2B", "LibMoE"],
)
def test_the_models_of_the_recipe_are_of_their_size(patterns, parameters):
    model = upcycle_modules(phi3_mini_with_clip(), patterns)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if patterns == [PROJECTOR]:
        assert parameters == 4_174_947_328  # "about 4.175B"
    symphonize(model)
    assert {graph.shape for graph in expert_graphs(model).values()} == {(4, 4)}


def test_a_config_object_may_be_used_again(dense):
    config = copy.deepcopy(dense.config)
    model = upcycle_modules(AutoModelForImageTextToText.from_config(config), PROJECTOR)
    assert not hasattr(config, "upcycled")
    second = AutoModelForImageTextToText.from_config(config)
    assert not any(isinstance(module, UpcycledMoE) for module in second.modules())
    assert model.model.config is model.config
    assert model.model.language_model.config is model.config.text_config


def test_the_experts_follow_the_models_setting_when_it_is_symphonized_too(dense):
    model = symphonize(upcycled(dense))
    model.config._experts_implementation = "batched_mm"
    experts = [module.experts for module in model.modules() if isinstance(module, UpcycledMoE)]
    followed = [module.config._experts_implementation for module in experts if hasattr(module, "config")]
    assert followed == ["batched_mm"] * len(followed)
    assert followed


def test_the_names_are_public():
    assert symphony_hf.upcycle_modules is upcycle_modules
