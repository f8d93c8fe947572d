"""A checkpoint, opened to be made smaller: as a plain model, with its graphs beside it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..folding import fold
from ..patching import expert_graphs, is_symphonized
from ..robustness.measure import default_block_size
from ..robustness.subject import Subject, load_tokenizer
from ..saving import ARCHITECTURE_PREFIX
from .layers import ExpertLayer, expert_layers
from .settings import TextSettings


@dataclass(frozen=True)
class Opened:
    """What the commands work on.

    Attributes:
        model: Plain: a Symphony model's graphs are folded into its routers.
        tokenizer: Its own, or the one that was named.
        graphs: By router's name; empty where the model was plain.
        layers: Its routers and experts.
        block_size: Tokens of a window.
        fingerprint: Of the checkpoint.
    """

    model: PreTrainedModel
    tokenizer: Any
    graphs: dict[str, Tensor]
    layers: list[ExpertLayer]
    block_size: int
    fingerprint: str


def open_model(settings: TextSettings) -> Opened:
    """Load a checkpoint.

    Raises:
        ConfigError: If there is none, or its tokenizer is missing.
        UnsupportedModelError: If it is quantized, has upcycled modules, is more than a language model, has experts of a
            form that is not known, or does not fit one device.
        FoldError: If its graphs smooth scores, which no plain router computes.
    """
    subject = Subject(settings.model, settings.revision, settings.dtype)
    where = f"{settings.command}: `{settings.model}`"
    if getattr(subject.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{where} is quantized, and packed experts can be neither averaged nor cut: take it in bfloat16 or "
            "float32, and quantize what comes out"
        )
    if getattr(subject.config, "upcycled", None) is not None:
        raise UnsupportedModelError(f"{where} has modules of `upcycle_modules`, for which there is no stock class")
    model = subject.model
    named = [name.removeprefix(ARCHITECTURE_PREFIX) for name in subject.config.architectures or ()]
    if named and type(model).__name__ not in named:
        raise UnsupportedModelError(
            f"{where} is a {named[0]}, of which {type(model).__name__} is a part: the rest would be lost"
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise UnsupportedModelError(f"{where} is spread over several devices: give one with room, or hide the GPUs")
    tokenizer = load_tokenizer(settings.tokenizer or settings.model, None if settings.tokenizer else settings.revision)
    graphs = {}
    if is_symphonized(model):
        graphs = expert_graphs(model)
        fold(model)
    block_size = settings.block_size or default_block_size([subject])
    return Opened(model, tokenizer, graphs, expert_layers(model), block_size, subject.fingerprint)
