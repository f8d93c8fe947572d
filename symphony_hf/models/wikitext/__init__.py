"""The paper's WikiText-103 systems as a transformers model. Importing this registers the config with AutoConfig."""

from transformers import AutoConfig

from .configuration import WikiTextMoeConfig

AutoConfig.register(WikiTextMoeConfig.model_type, WikiTextMoeConfig)
