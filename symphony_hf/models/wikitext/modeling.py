"""The language model of the paper's WikiText-103 experiments: SMoE, XMoE, GLaM, and their momentum forms."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from symphony_hf.models.routers import TEMPERATURE, CosineRouter, LinearRouter, SmoothRouter, TopKRouter
from symphony_hf.models.upcycled_moe import grouped_linear, run_sorted

from .attention import SpanAttention, StreamMemory, forget
from .configuration import WikiTextMoeConfig
from .vocabulary import IGNORED, VocabularyHead, next_word_loss


@use_experts_implementation(has_bias=True, has_gate=False)
class WikiTextMoeExperts(nn.Module):
    """Feed-forward experts, their weights stacked: linear, ReLU, dropout, linear."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = experts
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, inner))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """With `experts_implementation="eager"`: sorted by expert, and each expert on its slice.

        Args:
            hidden_states: Shape: (tokens, hidden_size).
            top_k_index: The experts of each token. Shape: (tokens, top_k).
            top_k_weights: Theirs. Same shape.

        Returns:
            The weighted sum of the experts' outputs. Shape: (tokens, hidden_size).
        """
        return run_sorted(hidden_states, top_k_index, top_k_weights, self.num_experts, self._run)

    def _run(self, x_SD: Tensor, lengths: list[int]) -> Tensor:
        inner_SI = self.act_fn(grouped_linear(x_SD, self.up_proj, self.up_proj_bias, lengths))
        return grouped_linear(inner_SI, self.down_proj, self.down_proj_bias, lengths)


class MoeFeedForward(nn.Module):
    """A router and its experts. Shape: (rows, length, hidden_size), in and out."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__()
        sizes = config.hidden_size, config.num_experts, config.num_experts_per_tok
        if config.router_type == "cosine":
            self.gate: TopKRouter = CosineRouter(*sizes, config.router_dim)
        else:
            kind = SmoothRouter if config.router_type == "smooth" else LinearRouter
            self.gate = kind(*sizes, bias=True)
        self.experts = WikiTextMoeExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden_TD = hidden.flatten(0, 1)
        _, weights_TK, indices_TK = self.gate(hidden_TD)
        return self.dropout(self.experts(hidden_TD, indices_TK, weights_TK)).view_as(hidden)


class FeedForward(nn.Sequential):
    """What GLaM has in the blocks without experts. Shape: (..., hidden_size), in and out."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        up = nn.Linear(config.hidden_size, config.intermediate_size)
        down = nn.Linear(config.intermediate_size, config.hidden_size)
        super().__init__(up, nn.ReLU(), nn.Dropout(config.dropout), down)


class WikiTextMoeBlock(GradientCheckpointingLayer):
    """Attention, then experts or a feed-forward; each is added to its input, and the sum normalized.

    Around the experts that is done twice, as in the code base whose numbers the paper has. Of its `norm2` and `norm3`
    a block uses one; the other is in the published count of parameters, and frozen here.
    """

    def __init__(self, config: WikiTextMoeConfig, layer_idx: int) -> None:
        super().__init__()
        has_experts = layer_idx % config.moe_every == 0
        self.attn = SpanAttention(config, layer_idx)
        self.moe = MoeFeedForward(config) if has_experts else None
        self.ff = None if has_experts else FeedForward(config)
        self.moe_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if has_experts else None
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(3))
        (self.norm3 if has_experts else self.norm2).requires_grad_(False)
        self.momentum, self.momentum_step = config.momentum, config.momentum_step

    def forward(
        self,
        hidden: Tensor,
        velocity: Tensor | None,
        distance_keys_SD: Tensor,
        states: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            hidden: Shape: (rows, length, hidden_size).
            velocity: The MoE outputs' momentum from the blocks before; None in the first. Same shape.
            distance_keys_SD: The attention's. Shape: (span, head size).
            states: The attention's memory of hidden states.
            past_key_values: The attention's memory of keys and values.

        Returns:
            Hidden states, and the momentum; None without.
        """
        hidden = self.norm1(hidden + self.attn(hidden, distance_keys_SD, states, past_key_values))
        if self.moe is None:
            assert self.ff is not None
            return self.norm3(hidden + self.ff(hidden)), velocity
        assert self.moe_norm is not None
        output = self.moe(hidden)
        if self.momentum is not None:
            output = self.momentum_step * output
            velocity = output if velocity is None else self.momentum * velocity + output
            output = velocity
        return self.norm2(hidden + self.moe_norm(hidden + output)), velocity


class WikiTextMoePreTrainedModel(PreTrainedModel):
    """What the model and its base have in common."""

    config: WikiTextMoeConfig
    config_class = WikiTextMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WikiTextMoeBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "hidden_states": OutputRecorder(WikiTextMoeBlock, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialization everywhere, as the published model has it; experts are near zero by it."""
        if isinstance(module, nn.Linear):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WikiTextMoeExperts):
            for weight in (module.up_proj, module.down_proj):
                bound = math.prod(weight.shape[1:]) ** -0.5  # the fan-in that PyTorch sees in a stack of matrices
                init.uniform_(weight, -bound, bound)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, CosineRouter):
            init.orthogonal_(module.embeddings.weight)
            init.constant_(module.log_temperature, math.log(TEMPERATURE))
            init.eye_(module.mix.weight)
        elif isinstance(module, WikiTextMoeModel):
            init.normal_(module.distance_keys)


class WikiTextMoeModel(WikiTextMoePreTrainedModel):
    """Embeddings and blocks, which read blocks of streams with a memory of what was before them."""

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        head_size = config.hidden_size // config.num_attention_heads
        self.distance_keys = nn.Parameter(torch.empty(config.attention_span, head_size))
        self.layers = nn.ModuleList(WikiTextMoeBlock(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StreamMemory | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        continues: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Read one block of each stream; see `WikiTextMoeForCausalLM.forward`."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = self._empty_memory()
        if past_key_values is not None and continues is not None:
            forget(past_key_values, continues)
        mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :, None].to(hidden.dtype)
        velocity: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if mask is not None:
                hidden = hidden * mask  # to a padded position's neighbours it is as if nothing were there
            if isinstance(past_key_values, StreamMemory):
                memory: dict[str, Any] = {"states": past_key_values.push(index, hidden)}
            else:
                memory = {"past_key_values": past_key_values}
            hidden, velocity = layer(hidden, velocity, self.distance_keys, **memory)
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _empty_memory(self) -> StreamMemory | Cache:
        if torch.is_grad_enabled():
            return StreamMemory(self.config.attention_span, len(self.layers))
        return DynamicCache(config=self.config)


class WikiTextMoeForCausalLM(WikiTextMoePreTrainedModel, GenerationMixin):
    """The language model.

    Args:
        config: Sizes and form.

    Source: the code base of MomentumSMoE (arXiv 2410.14574), which the paper's own group shares. Deviation: of a
        batch, it drops the words after the last whole block; here nothing is dropped.
    """

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__(config)
        self.model = WikiTextMoeModel(config)
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.loss_function = next_word_loss
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head, such as a resized one, which transformers makes a plain linear map."""
        new_embeddings.__class__ = VocabularyHead
        self.lm_head = cast(VocabularyHead, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StreamMemory | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        continues: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Read one block of each stream, and predict the words after its words.

        Args:
            input_ids: Words. Shape: (rows, length).
            attention_mask: 0 for padding. Shape: (rows, length), or with what came before in front.
            past_key_values: What the last call returned, if the rows go on where they stopped in it.
            inputs_embeds: In place of words. Shape: (rows, length, hidden_size).
            labels: The words again; -100 for none. Each is predicted at the position before it, and the first one of a
                block not at all. Shape: (rows, length).
            use_cache: Whether the memory for the next call is returned; as the config says when None.
            continues: False for each row that begins another stream, and forgets the one before. Shape: (rows,).
            logits_to_keep: How many positions, from the last, get logits; 0 for all. When None: all without labels;
                with them none, which do not fit into memory.
            num_items_in_batch: Predicted words of the whole optimizer step; Trainer gives it.
            **kwargs: `shift_labels`, the word after each position, in place of labels: with the first of the next
                block. It is no argument of its own, as Trainer would want it in every batch that it evaluates.

        Returns:
            Loss, logits and memory, each where it is asked for.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            continues=continues,
            **kwargs,
        )
        hidden, loss, logits = outputs.last_hidden_state, None, None
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if shift_labels is not None:
            loss = self.loss_function(
                self.lm_head, hidden, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
            )
        if shift_labels is None or logits_to_keep is not None:
            kept = (
                slice(-(logits_to_keep or 0) or None, None)
                if not isinstance(logits_to_keep, Tensor)
                else logits_to_keep
            )
            logits = self.lm_head(hidden[:, kept])
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
        )


AutoModel.register(WikiTextMoeConfig, WikiTextMoeModel)
AutoModelForCausalLM.register(WikiTextMoeConfig, WikiTextMoeForCausalLM)
