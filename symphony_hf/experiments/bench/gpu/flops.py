"""Model FLOPs of a step, by formula, for model FLOPs utilization (MFU).

Recomputation does not count, unlike in `symphony plan`, which counts executed FLOPs. A weight costs 2 FLOPs per token
in the forward, 2 for the gradient of its input and 2 for its own: the 6 N T of full training. A frozen weight costs 4,
or 2 if no gradient flows below it. N includes the chosen experts only, and no embedding table. Causal attention counts
half of the square.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .shapes import NUM_EXPERTS, TOP_K, image_tokens, vision_of

MODES = ("lora", "full", "inference")
LORA_RANK = 16
LORA_TARGETS = {"qwen2_moe": ("q_proj", "k_proj", "v_proj", "o_proj"), "phi3": ("qkv_proj", "o_proj")}

PEAK_TFLOPS = (
    ("H200 NVL", 835.5),
    ("H200", 989.5),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.5),
    ("A100", 312.0),
)
"""Dense bfloat16 peaks from data sheets, by a part of the device name. The first match counts."""


@dataclass(frozen=True)
class ModelPart:
    """A group of weights that the same tokens pass through.

    Attributes:
        weights: Number of weights that each token is multiplied with.
        trained: Number of them that get a gradient.
        tokens: Number of tokens in one sequence.
        attention: Forward FLOPs of the attention products, for one sequence.
        passes_gradient: Whether a gradient flows through to the parts below.
    """

    weights: int
    trained: int
    tokens: int
    attention: int = 0
    passes_gradient: bool = False

    @property
    def flops(self) -> int:
        """FLOPs for one sequence, forward and backward."""
        product = 2 * self.weights * self.tokens
        backward = product + 2 * self.attention if self.passes_gradient else 0
        return product + self.attention + backward + 2 * self.trained * self.tokens


def model_flops(config: PreTrainedConfig, mode: str, text_tokens: int) -> int:
    """Return the model FLOPs of a step per sequence."""
    return sum(part.flops for part in parts_of(config, mode, text_tokens))


def parts_of(config: PreTrainedConfig, mode: str, text_tokens: int) -> list[ModelPart]:
    """Return the parts of a model in a mode."""
    text, tokens = config.get_text_config(), text_tokens + image_tokens(config)
    head = text.vocab_size * text.hidden_size
    parts = [
        _text_part(text, mode, tokens),
        # Prefill computes only the logits of the last token.
        ModelPart(head, head if mode == "full" else 0, 1 if mode == "inference" else tokens, 0, mode != "inference"),
    ]
    return parts if vision_of(config) is None else parts + _vision_parts(config, mode)


def idle_parameters(config: PreTrainedConfig) -> int:
    """Return the number of parameters that a token does not use: those of the experts that it does not choose."""
    text = config.get_text_config()
    experts = _sparse_layers(text) * _mlp_weights(text)
    if vision_of(config) is not None:
        width, text_width = config.vision_config.hidden_size, text.hidden_size
        experts += text_width * (width + 1) + text_width * (text_width + 1)  # with biases
    return (NUM_EXPERTS - TOP_K) * experts


def _sparse_layers(text: PreTrainedConfig) -> int:
    return text.num_hidden_layers // text.decoder_sparse_step if text.model_type == "qwen2_moe" else 0


def _mlp_weights(text: PreTrainedConfig) -> int:
    """Return the number of weights of a dense MLP, or of an expert of the same size."""
    return 3 * text.hidden_size * text.intermediate_size


def _text_part(text: PreTrainedConfig, mode: str, tokens: int) -> ModelPart:
    width, layers, sparse = text.hidden_size, text.num_hidden_layers, _sparse_layers(text)
    attention_maps = 4 * width * width  # all heads have their own keys and values
    base = layers * attention_maps + (layers - sparse + sparse * TOP_K) * _mlp_weights(text)
    routers = sparse * NUM_EXPERTS * width
    gates = sparse * width  # of the shared experts, which have size 0
    adapters = lora_weights(text) if mode == "lora" else 0
    weights = base + routers + gates + adapters
    trained = {"full": weights, "lora": adapters + routers, "inference": 0}[mode]
    return ModelPart(weights, trained, tokens, layers * 2 * width * tokens**2, mode != "inference")


def lora_weights(text: PreTrainedConfig) -> int:
    """Return the number of LoRA weights on a text model's attention."""
    width, maps = text.hidden_size, LORA_TARGETS[text.model_type]
    outputs = {"qkv_proj": 3 * width}
    return text.num_hidden_layers * LORA_RANK * sum(width + outputs.get(name, width) for name in maps)


def _vision_parts(config: PreTrainedConfig, mode: str) -> list[ModelPart]:
    vision, patches, full = config.vision_config, image_tokens(config), mode == "full"
    width, tokens = vision.hidden_size, patches + 1  # the class token
    used = range(vision.num_hidden_layers + 1)[config.vision_feature_layer]  # the layers above are not used
    embedding = vision.num_channels * vision.patch_size**2 * width
    tower = used * (4 * width**2 + 2 * width * vision.intermediate_size)
    text_width = config.text_config.hidden_size
    router = NUM_EXPERTS * width
    projector = TOP_K * text_width * (width + text_width) + router
    return [
        ModelPart(embedding, embedding if full else 0, patches),
        ModelPart(tower, tower if full else 0, tokens, used * 4 * width * tokens**2, full),
        ModelPart(projector, {"full": projector, "lora": router, "inference": 0}[mode], patches, 0, full),
    ]


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bfloat16 TFLOP/s of a device; None if it is unknown."""
    return next((peak for part, peak in PEAK_TFLOPS if part in device_name), None)
