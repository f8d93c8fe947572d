"""The model of a run: the recipe's sizes, in the form of a point."""

from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from symphony_hf.patching.symphonize import symphonize, symphony_routers
from symphony_hf.recipe import Recipe

from .point import SYSTEMS, Point
from .selection import select_conditionally


def build_model(recipe: Recipe, point: Point, vocab_size: int, checkpoint: Path | None = None) -> PreTrainedModel:
    """Build a model of the recipe's sizes with the point's system, control and routing, from the global generator.

    Args:
        recipe: The study's recipe.
        point: The point.
        vocab_size: Number of tokens.
        checkpoint: Weights of a pre-trained model; at random when None.

    Raises:
        ConfigError: If the recipe's model does not exist, or cannot have the point's settings.
        UnsupportedModelError: If a layer of the point has no router.
    """
    assert recipe.model.config is not None
    values = {**recipe.model.config, **SYSTEMS[point.system], "vocab_size": vocab_size, "use_cache": False}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if point.control == "chosen_experts":
        config.num_experts = config.num_experts_per_tok
    model = AutoModelForCausalLM.from_config(config)
    if point.selection == "conditional":
        select_conditionally(model)
    if checkpoint is not None:
        model.load_state_dict(load_file(checkpoint))
    model = symphonize(model, point.symphony(recipe.symphony))
    if point.control == "frozen_routers":
        for name, _ in symphony_routers(model):
            model.get_submodule(name).requires_grad_(False)
    return model
