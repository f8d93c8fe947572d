"""Settings that a family needs beyond the rule of `tiny.shrink`, and the families that have no tiny model."""

from typing import Any

_GEMMA_MOE = {"enable_moe_block": True, "moe_intermediate_size": 16}  # of Gemma 4, only the 26B-A4B is a mixture
_GEMMA_VISION = {"model_type": "gemma4_vision"}  # missing in a default config
_HALF_SLIDING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
_HALF_SHARED = {"indexer_types": ["full", "shared", "full", "shared"]}
_HALF_INDEXED = {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse"]}
# The sections (time, height, width) add up to half of a head's dimensions.
_IMAGE_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [3],  # counted from one; a layer of linear attention
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {144: 4}},  # an image's patches to its tokens
    "dbrx": {
        # Without the first two, which only the released checkpoint's config gives, its attention fails.
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "diffusion_gemma": {
        "text_config": {"moe_intermediate_size": 16, "final_logit_softcapping": 30.0},
        "vision_config": _GEMMA_VISION,
        "canvas_length": 8,
    },
    "doge": {"is_moe": True, "num_experts": 16},  # a square number: an expert is a pair of keys
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": {"head_dim": 24}},  # with rotation and without, 8 + 16
    "dots3_note_text": {"head_dim": 24},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _IMAGE_ROPE}},
    "gemma4": {"text_config": _GEMMA_MOE, "vision_config": _GEMMA_VISION},
    "gemma4_text": _GEMMA_MOE,
    "glm4v_moe": {"text_config": {"rope_parameters": _IMAGE_ROPE}},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_moe_dsa": _HALF_SHARED,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "hy_v4_vl": {"text_config": {"rope_parameters": _IMAGE_ROPE}},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 3},
    "laguna": {"layer_types": _HALF_SLIDING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4": {"vision_config": {"intermediate_size": 128}},  # four patches side by side
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},  # the rotated part, and all
    "mellum": {"layer_types": _HALF_SLIDING},
    "minimax_m3_vl": {"text_config": _HALF_INDEXED},
    "minimax_m3_vl_text": _HALF_INDEXED,
    "mistral_large4": {"text_config": _HALF_SHARED},
    "muse_spark": {"out_hidden_size": 128},  # four patches side by side
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"]},
    # No noise here, but how near the best an expert must be to share its weight; at 0 no router would learn.
    "phimoe": {"router_jitter_noise": 0.5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},  # which only the released config has
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "step3p7": {"text_config": {"sliding_window": 8, "layer_types": _HALF_SLIDING}},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"], "sliding_window": 8},
}

NOT_BUILT: dict[str, str] = {
    "granite_docling": "its density router picks how finely to cut an image; it has no experts",
    "qwen3_omni_moe": "the whole has no forward, it only generates; its thinker, qwen3_omni_moe_thinker, has a row",
    "vitpose_backbone": "the number of the dataset, given with the input, chooses its expert; nothing routes",
}
# Broken in transformers itself: the releases, and the fault.
BROKEN: dict[str, tuple[str, str]] = {
    "doge": ("<5.23", "its decoder layer takes the pair that its experts return, of states and logits, for the states"),
    "llama4": ("==5.24.*", "its forward reads `image_outputs` off its text model's output, which has none"),
}
NO_LOSS: dict[str, str] = {
    "diffusion_gemma": "its forward takes no labels: it gives logits for a canvas of noise, not for a next token",
}
