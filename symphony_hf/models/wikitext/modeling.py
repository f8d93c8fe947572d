"""The language model of the paper's WikiText-103 experiments: SMoE, XMoE, GLaM, and their momentum forms."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from symphony_hf.models.routers import TEMPERATURE, CosineRouter, TopKRouter

from .attention import StreamMemory, forget
from .blocks import WikiTextMoeBlock, WikiTextMoeExperts
from .configuration import CACHE_NAMES, WikiTextMoeConfig
from .vocabulary import IGNORED, VocabularyHead, next_word_loss

_CACHE_FIELD = next(name for name in CACHE_NAMES if name in MoeModelOutputWithPast.__dataclass_fields__)


class WikiTextMoePreTrainedModel(PreTrainedModel):
    """Common base of the model with and without its head."""

    config: WikiTextMoeConfig
    config_class = WikiTextMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WikiTextMoeBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _can_record_outputs = {
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "hidden_states": OutputRecorder(WikiTextMoeBlock, index=0),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Use PyTorch's default initialization everywhere, as the published model does; experts start near zero."""
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
    """Embeddings and blocks; reads streams of text block by block, with a memory of the blocks before."""

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
        cache: StreamMemory | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        continues: Tensor | None = None,
        past_key_values: StreamMemory | Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Read one block of each stream; see `WikiTextMoeForCausalLM.forward`."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        memory = past_key_values if cache is None else cache
        if memory is None and (self.config.use_cache if use_cache is None else use_cache):
            memory = self._empty_memory()
        if memory is not None and continues is not None:
            forget(memory, continues)
        mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :, None].to(hidden.dtype)
        velocity: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if mask is not None:
                hidden = hidden * mask  # its neighbours then see a padded position as they see the start of a stream
            if isinstance(memory, StreamMemory):
                hidden, velocity = layer(hidden, velocity, self.distance_keys, memory.push(index, hidden))
            else:
                hidden, velocity = layer(hidden, velocity, self.distance_keys, cache=memory)
        return MoeModelOutputWithPast(last_hidden_state=hidden, **{_CACHE_FIELD: memory})

    def _empty_memory(self) -> StreamMemory | Cache:
        if torch.is_grad_enabled():
            return StreamMemory(self.config.attention_span, len(self.layers))
        return DynamicCache(config=self.config)


class WikiTextMoeForCausalLM(WikiTextMoePreTrainedModel, GenerationMixin):
    """The language model.

    Source: the code base of MomentumSMoE (arXiv 2410.14574), by the paper's own group. Deviation: it drops the words of
    a batch after the last whole block; nothing is dropped here.
    """

    def __init__(self, config: WikiTextMoeConfig) -> None:
        super().__init__(config)
        self.model = WikiTextMoeModel(config)
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size)
        self.loss_function = next_word_loss
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the LM head; a resized one, which transformers makes a plain linear map, becomes a `VocabularyHead`."""
        new_embeddings.__class__ = VocabularyHead
        self.lm_head = cast(VocabularyHead, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: StreamMemory | Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        continues: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: StreamMemory | Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Read one block of each stream and predict the word after each of its words.

        Args:
            input_ids: Word ids. Shape: (rows, length).
            attention_mask: 0 at padding. Shape: (rows, length), or longer, with earlier positions in front.
            cache: Memory that the previous call returned, if the rows continue its rows.
            inputs_embeds: Embeddings, instead of word ids. Shape: (rows, length, hidden_size).
            labels: Word ids again, with -100 for words to ignore. Each is predicted at the position before it, so the
                first word of a block is not predicted. Shape: (rows, length).
            use_cache: Whether to return the memory for the next call; by default as in the config.
            continues: False for each row that starts another stream, whose memory is emptied. Shape: (rows,).
            logits_to_keep: Number of positions, counted from the last, that get logits, 0 for all; or their indices.
                By default all positions without labels and none with labels, whose logits would not fit into memory.
            num_items_in_batch: Number of predicted words in the whole optimizer step, as passed by Trainer.
            past_key_values: `cache`, by its name in transformers before 5.24.
            **kwargs: `shift_labels`: the word after each position, instead of labels, with the first word of the next
                block. It is no named argument, because Trainer would then require it in every evaluation batch.

        Returns:
            Loss, logits and memory, as far as requested.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
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
            is_indices = isinstance(logits_to_keep, Tensor)
            logits = self.lm_head(hidden[:, logits_to_keep if is_indices else slice(-(logits_to_keep or 0), None)])
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            **{_CACHE_FIELD: outputs.get(_CACHE_FIELD)},
        )


AutoModel.register(WikiTextMoeConfig, WikiTextMoeModel)
AutoModelForCausalLM.register(WikiTextMoeConfig, WikiTextMoeForCausalLM)
