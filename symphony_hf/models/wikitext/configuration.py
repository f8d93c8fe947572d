"""The config of the WikiText language model."""

import importlib
from typing import Literal, get_args

from transformers import PreTrainedConfig

from symphony_hf.errors import ConfigError, nearest

MODELING = "symphony_hf.models.wikitext.modeling"
"""Registers the models with transformers' Auto classes. Importing it takes seconds, so the first config does it."""

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the memory in arguments and outputs: since transformers 5.24, and before."""

RouterType = Literal["linear", "cosine", "smooth"]


class WikiTextMoeConfig(PreTrainedConfig):
    """Sizes and forms of `WikiTextMoeForCausalLM`; the defaults are the published SMoE on WikiText-103.

    SMoE is the default; XMoE has `router_type="cosine"`, GLaM `moe_every=2`; `momentum=0.7` gives the MomentumSMoE of
    each.

    Args:
        vocab_size: Number of words.
        hidden_size: Size of the hidden states.
        intermediate_size: Inner size of experts, and of feed-forward networks in blocks without experts.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of attention heads, which divides `hidden_size`.
        attention_span: Number of positions before its own that a token attends to.
        num_experts: Number of experts in a block.
        num_experts_per_tok: Number of experts that a token selects.
        moe_every: Distance between blocks with experts, from the first block on; the others are dense.
        router_type: `linear`; `cosine` in a space of `router_dim` dimensions; or `smooth`, which is linear with a soft
            contribution of the expert just below the top-k (SmoothSMoE).
        router_dim: Dimension of the cosine router's space; by default half the number of experts.
        momentum: mu, the momentum of the MoE outputs across blocks; by default none.
        momentum_step: gamma, the step size of the momentum.
        dropout: Dropout on attention weights, expert activations and expert outputs.
        layer_norm_eps: Epsilon of the layer norms.
        use_cache: Whether a forward returns its memory for the next one.
        tie_word_embeddings: False: the LM head has weights of its own.

    Raises:
        ConfigError: If a value is out of range or contradicts another one.

    Source: the code base of MomentumSMoE (arXiv 2410.14574), for the sizes and the form.
    """

    model_type = "wikitext_moe"
    keys_to_ignore_at_inference = list(CACHE_NAMES)
    attribute_map = {"num_local_experts": "num_experts"}

    vocab_size: int = 267_735
    hidden_size: int = 352
    intermediate_size: int = 352
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    attention_span: int = 1024
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_every: int = 1
    router_type: RouterType = "linear"
    router_dim: int | None = None
    momentum: float | None = None
    momentum_step: float = 1.0
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        importlib.import_module(MODELING)
        if self.router_dim is None:
            self.router_dim = max(self.num_experts // 2, 1)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("attention_span", "num_experts", "num_experts_per_tok", "moe_every", "router_dim"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.model_type}: `{name}` must be an integer of at least 1, got {value!r}")
        if self.tie_word_embeddings:
            raise ConfigError(
                f"{self.model_type}: `tie_word_embeddings` is {self.tie_word_embeddings!r}, but the LM head has "
                "weights of its own: set it to false"
            )
        if self.router_type not in get_args(RouterType):
            hint = nearest(str(self.router_type), get_args(RouterType))
            raise ConfigError(f"{self.model_type}: `router_type` is {self.router_type!r}; {hint}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{self.model_type}: hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} "
                "heads (num_attention_heads)"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"{self.model_type}: num_experts_per_tok {self.num_experts_per_tok} is more than the "
                f"{self.num_experts} experts (num_experts)"
            )
        if self.router_type == "smooth" and self.num_experts_per_tok == self.num_experts:
            raise ConfigError(
                f"{self.model_type}: router_type `smooth` lifts in an expert that is not chosen, and all "
                f"{self.num_experts} are: lower num_experts_per_tok"
            )
        for name, value, low, high in (
            ("momentum", self.momentum or 0.0, 0.0, 1.0),
            ("dropout", self.dropout, 0.0, 1.0),
        ):
            if not low <= value < high:
                raise ConfigError(f"{self.model_type}: `{name}` must be from {low:g} to below {high:g}, got {value!r}")

    @property
    def sliding_window(self) -> int:
        """Number of positions that transformers' caches keep, which includes the token itself."""
        return self.attention_span + 1
