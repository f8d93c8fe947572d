"""The paper's WikiText-103 systems as a model of transformers, and what its data needs."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .config import WikiTextMoeConfig
from .modeling import WikiTextMoeForCausalLM, WikiTextMoeModel

__all__ = ["WikiTextMoeConfig", "WikiTextMoeForCausalLM", "WikiTextMoeModel"]

AutoConfig.register(WikiTextMoeConfig.model_type, WikiTextMoeConfig)
AutoModel.register(WikiTextMoeConfig, WikiTextMoeModel)
AutoModelForCausalLM.register(WikiTextMoeConfig, WikiTextMoeForCausalLM)
