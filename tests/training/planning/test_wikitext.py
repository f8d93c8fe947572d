"""The plan of the paper's WikiText-103 model, whose loss never materializes all logits."""

from pathlib import Path

import pytest
from planned import MICRO_BATCH, measured_peak

from symphony_hf.models.wikitext import vocabulary
from symphony_hf.recipe import load_recipe
from symphony_hf.training.planning.launches import Launch
from symphony_hf.training.planning.memory import memory_of, states_of
from symphony_hf.training.planning.optimizers import optimizer_of
from symphony_hf.training.planning.settings import read_settings
from symphony_hf.training.planning.step import MetaStep, meta_model

SMOKE = Path(__file__).parents[3] / "recipes" / "wikitext103-216m" / "smoke.yaml"
HIDDEN, INNER, LAYERS, HEADS, EXPERTS, SPAN, VOCABULARY, TOKENS = 64, 48, 2, 4, 4, 128, 2048, 256


def make_recipe(**config):
    sizes = {
        "model_type": "wikitext_moe",
        "use_cache": False,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "attention_span": SPAN,
        "num_experts": EXPERTS,
        "vocab_size": VOCABULARY,
    }
    train = {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": 1}
    data = {"data.vocab_size": VOCABULARY, "data.block_size": TOKENS}
    return load_recipe(SMOKE, {"model.config": {**sizes, **config}, **data, **train})


@pytest.mark.thorough
@pytest.mark.parametrize("config", [{}, {"router_type": "cosine"}, {"moe_every": 2}, {"momentum": 0.7}], ids=str)
def test_the_memory_of_a_step_is_what_is_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CPU_CHUNK", vocabulary._CHUNK)  # a GPU's chunks are larger than a CPU's
    recipe = make_recipe(**config)
    settings = read_settings(recipe)
    step = MetaStep(recipe, settings, None).bytes(MICRO_BATCH)
    states = states_of(meta_model(recipe), quantized=False)
    memory = memory_of(
        Launch("cpu", "single", on_gpu=False), 1, states, step, optimizer_of(settings.optimizer), None, False
    )
    assert memory.host_total == pytest.approx(measured_peak(recipe, tmp_path / "trace.json"), rel=0.02)


def test_flops_by_hand():
    recipe = make_recipe()
    flops = MetaStep(recipe, read_settings(recipe), None).flops()
    head = 3 * 2 * TOKENS * HIDDEN * VOCABULARY  # the logits, the states' gradient, the weights'
    projections = 4 * HIDDEN**2
    experts = 2 * 2 * HIDDEN * INNER  # two of them, two matrices
    router = HIDDEN * EXPERTS
    weights = 3 * 2 * TOKENS * LAYERS * (projections + experts + router)
    # Queries by the keys of their chunk, by distances, and weights by values; each in both directions of the backward.
    attention = 3 * 2 * TOKENS * LAYERS * HIDDEN * (2 * (SPAN + SPAN) + SPAN)
    assert flops == pytest.approx(head + weights + attention, rel=0.02)  # the graphs' products, and the bias's column
