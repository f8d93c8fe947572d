"""The models are made known to transformers' Auto classes with the first config: importing them takes seconds."""

import functools


@functools.cache
def register_models() -> None:
    """Make `AutoModel` and `AutoModelForCausalLM` know the classes of a `WikiTextMoeConfig`; once."""
    from transformers import AutoModel, AutoModelForCausalLM

    from .config import WikiTextMoeConfig
    from .modeling import WikiTextMoeForCausalLM, WikiTextMoeModel

    AutoModel.register(WikiTextMoeConfig, WikiTextMoeModel)
    AutoModelForCausalLM.register(WikiTextMoeConfig, WikiTextMoeForCausalLM)
