"""The forms of a model (stock, symphonized, folded) with shared weights, and the steps that are timed."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from symphony_hf.experiments.bench.timing import DECAY
from symphony_hf.patching.attachment import update_graphs
from symphony_hf.patching.folding import fold
from symphony_hf.patching.symphonize import all_routers, expert_graphs, symphonize

from .flops import LORA_RANK, LORA_TARGETS

LEARNING_RATE = 1e-5


def training_forms(model: PreTrainedModel, mode: str) -> dict[str, nn.Module]:
    """Return the stock and the symphonized form of a new model, ready to train shared weights.

    `lora` trains adapters on the text model's attention, and the routers; `full` trains everything. The given model
    becomes the symphonized form.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forms: dict[str, Any] = {"stock": _share_weights(model), "symphony": symphonize(model, decay=DECAY)}
    if mode == "lora":
        forms = _adapt(forms, LORA_TARGETS[model.config.get_text_config().model_type])
    return {name: form.train() for name, form in forms.items()}


def inference_forms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the symphonized form, with graphs as after training, its folded form, and a stock one with folded routers.

    The three compute the same, and share all weights except the routers'. The given model becomes the symphonized form.
    """
    routers = [router.name for router in all_routers(model)]
    own = {id(p) for name in routers for p in model.get_submodule(name).parameters()}
    stock = _share_weights(model, own)
    symphonize(model)
    _move_graphs(model)
    folded = fold(_share_weights(model, own))
    for name in routers:
        stock.get_submodule(name).load_state_dict(folded.get_submodule(name).state_dict())
    forms = {"stock": stock, "symphony": model, "folded": folded}
    return {name: form.eval() for name, form in forms.items()}


def _share_weights(model: PreTrainedModel, own: Collection[int] = ()) -> PreTrainedModel:
    """Copy a model's modules, but share its parameters, except those with an id in `own`."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def _move_graphs(model: nn.Module) -> None:
    """Add small off-diagonal entries to each graph, as training does."""
    generator = torch.Generator().manual_seed(0)
    for name in expert_graphs(model):
        router: Any = model.get_submodule(name)
        adjacency = router.symphony.adjacency
        random = torch.rand(adjacency.shape, generator=generator).to(adjacency)
        with torch.no_grad():
            adjacency.add_(0.02 * (random + random.T) * adjacency.diagonal().mean())


def _adapt(forms: dict[str, Any], targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Add one shared set of adapters to both forms. Routers in `modules_to_save` train, and keep their graphs."""
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
    """Return AdamW for adapters; for full training bitsandbytes' 8-bit AdamW, or Adafactor without bitsandbytes."""
    if mode != "full":
        return "AdamW" if mode == "lora" else None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return "Adafactor"
    return "AdamW8bit"


def make_optimizer(name: str, forms: dict[str, nn.Module]) -> torch.optim.Optimizer:
    """Create the optimizer of the weights that the forms share."""
    # Shared experts of size 0 have empty parameters, and optimizers divide by the number of elements.
    trained = [p for p in forms["stock"].parameters() if p.requires_grad and p.numel() > 0]
    if name == "AdamW":
        return torch.optim.AdamW(trained, lr=LEARNING_RATE)
    if name == "Adafactor":
        # One tensor at a time: `foreach` would hold a second set of gradients.
        return torch.optim.Adafactor(trained, lr=LEARNING_RATE, foreach=False)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trained, lr=LEARNING_RATE)


def training_step(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, has_graphs: bool
) -> Tensor:
    """Run forward, backward and optimizer step, and update the graphs if there are any. Returns the loss."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if has_graphs:
        update_graphs(model)
    return loss.detach()


@torch.inference_mode()
def prefill_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Run prefill: fill the cache and compute the logits of the last token. Returns their mean."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    return model(**prompt, use_cache=True, logits_to_keep=1).logits.float().mean()
