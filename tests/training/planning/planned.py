"""Recipes to plan, and the memory of one real step of each, measured by torch's profiler."""

import gc
import json
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from symphony_hf import add_router_losses, update_graphs
from symphony_hf.recipe import DataSection, ModelSection, PeftSection, Recipe
from symphony_hf.training.models import add_adapters, add_graph

SHAPES = {  # hidden, expert's inner, layers, vocabulary, tokens
    "tiny": (32, 48, 4, 512, 128),
    "middle": (256, 512, 4, 4096, 256),
}
FAMILIES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "qwen2_moe": {  # the container of an upcycled Phi-3
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
}
MICRO_BATCH = 4


def make_recipe(family="olmoe", size="tiny", *, lora=False, symphony=True, quantized=False, **train):
    hidden, inner, layers, vocabulary, tokens = SHAPES[size]
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": vocabulary,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **FAMILIES[family],
    }
    if family == "qwen2_moe":
        config["moe_intermediate_size"] = inner
    # Only checkpoints are packed; with a config at hand, this one is not looked for.
    packed = {"path": "nowhere", "quantization": "nf4", "dtype": "float32"} if quantized else {}
    more = {} if symphony else {"symphony": None}
    return Recipe(
        model=ModelSection(config=config, **packed),
        data=DataSection(block_size=tokens, vocab_size=max(vocabulary, 300)),
        peft=PeftSection(router="train") if lora else None,
        train={"per_device_train_batch_size": MICRO_BATCH, **train},
        **more,
    )


def measured_peak(recipe, path, **how):
    """Return the peak bytes of torch's CPU allocator, from the creation of the model to its second step."""
    gc.collect()  # else what an earlier model left would be freed, and subtracted, in between
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        _train(recipe, **how)
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in memory]
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])


def _train(recipe, checkpointing=False, every=1, autocast=False, accumulation=1, smoothing=0.0):
    config, section = dict(recipe.model.config), recipe.model
    named = {"attn_implementation": section.attention, "experts_implementation": section.experts}
    implementations = {name: value for name, value in named.items() if value is not None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of size 0
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config), **implementations
        )
    add_graph(model, recipe)
    model = add_adapters(model, recipe.peft).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False}, **({} if every == 1 else {"every_n_layers": every}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(0, recipe.data.vocab_size, (MICRO_BATCH, recipe.data.block_size))
    for _ in range(2):
        for _ in range(accumulation):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                outputs = model(input_ids=ids, labels=None if smoothing else ids, use_cache=False)
                if autocast:
                    outputs.logits = outputs.logits.float()  # as accelerate does
                loss = outputs.loss
                if smoothing:
                    loss = add_router_losses(model, LabelSmoother(smoothing)(outputs, ids, shift_labels=True))
                del outputs
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()
        if recipe.symphony is not None:
            update_graphs(model)
