"""A model in its forms, stock, symphonized and folded, all on one set of weights; and the steps that are timed."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import expert_graphs, symphonize

from .flops import LORA_RANK, LORA_TARGETS

DECAY = 0.999999
"""Of the graphs that train: they move at every step, at their full cost, but so little that the routing, and with it
the experts' work, stays the same as in the stock form."""

LEARNING_RATE = 1e-5


def training_forms(model: PreTrainedModel, mode: str) -> dict[str, nn.Module]:
    """The stock and the symphonized form of a model, ready to train the same weights.

    Args:
        model: Fresh. It becomes the symphonized form.
        mode: `lora`: adapters on the attention of the text model, and the routers, train. `full`: everything.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forms: dict[str, Any] = {"stock": _share_weights(model), "symphony": symphonize(model, decay=DECAY)}
    if mode == "lora":
        forms = _adapt(forms, LORA_TARGETS[model.config.get_text_config().model_type])
    return {name: form.train() for name, form in forms.items()}


def inference_forms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The symphonized form with graphs as training leaves them, its folded form, and a stock one with the same routers.

    The three compute the same, and share all weights but the routers'.

    Args:
        model: Fresh. It becomes the symphonized form.
    """
    symphonize(model)
    _move_graphs(model)
    routers = tuple(f"{name}." for name in expert_graphs(model))
    own = {id(p) for name, p in model.named_parameters() if name.startswith(routers)}
    folded = fold(_share_weights(model, own))
    forms = {"stock": _share_weights(folded), "symphony": model, "folded": folded}
    return {name: form.eval() for name, form in forms.items()}


def _share_weights(model: PreTrainedModel, own: Collection[int] = ()) -> PreTrainedModel:
    """A copy of a model's modules around the same parameters, but for those with an id in `own`."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def _move_graphs(model: nn.Module) -> None:
    """Give each graph neighbours, few beside its diagonal, as a learned one has."""
    generator = torch.Generator().manual_seed(0)
    for name in expert_graphs(model):
        router: Any = model.get_submodule(name)
        adjacency = router.symphony.adjacency
        random = torch.rand(adjacency.shape, generator=generator).to(adjacency)
        with torch.no_grad():
            adjacency.add_(0.02 * (random + random.T) * adjacency.diagonal().mean())


def _adapt(forms: dict[str, Any], targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Put one set of adapters around both forms. A router in `modules_to_save` trains, and keeps its graph."""
    routers = list(expert_graphs(forms["symphony"]))
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(targets), modules_to_save=routers, lora_dropout=0.0
    )
    adapted: dict[str, nn.Module] = {name: get_peft_model(form, copy.deepcopy(config)) for name, form in forms.items()}
    for name, parameter in adapted["stock"].named_parameters():
        if parameter.requires_grad:
            module, _, leaf = name.rpartition(".")
            setattr(adapted["symphony"].get_submodule(module), leaf, parameter)
    return adapted


def optimizer_name(mode: str) -> str | None:
    """AdamW for adapters; for everything bitsandbytes' 8-bit AdamW, or, without it, torch's Adafactor."""
    if mode != "full":
        return "AdamW" if mode == "lora" else None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return "Adafactor"
    return "AdamW8bit"


def make_optimizer(name: str, forms: dict[str, nn.Module]) -> torch.optim.Optimizer:
    """One optimizer of the weights that the forms share."""
    # Those of the shared experts of size 0 have no entries, which optimizers divide by.
    trained = [p for p in forms["stock"].parameters() if p.requires_grad and p.numel() > 0]
    if name == "AdamW":
        return torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if name == "Adafactor":
        # One tensor at a time: all at once hold a second set of gradients.
        return torch.optim.Adafactor(trained, lr=LEARNING_RATE, foreach=False)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trained, lr=LEARNING_RATE)


def training_step(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, has_graphs: bool
) -> Tensor:
    """Forward, backward, optimizer step, and, where there are graphs, theirs. Returns the loss."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if has_graphs:
        update_graphs(model)
    return loss.detach()


@torch.inference_mode()
def prefill_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Read the prompt: fill the cache, and give the last token's logits. Returns their mean."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    return model(**prompt, use_cache=True, logits_to_keep=1).logits.float().mean()
