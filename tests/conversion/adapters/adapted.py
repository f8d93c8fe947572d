"""Small adapted models, and helpers to compare them."""

import peft
import pytest
import torch
from models import make_ids, make_model

from symphony_hf import expert_graphs, load_adapter, lora_config, symphonize
from symphony_hf.patching.expert_graph import active_graph
from symphony_hf.patching.families.substitution import linear_of
from symphony_hf.patching.symphonize import symphony_routers

DECAY = 0.5


def adapt(model, name="default", seed=0, **settings):
    """Return an adapter as training would leave it: LoRA far from its start, and graphs that moved."""
    torch.manual_seed(seed)
    config = lora_config(model, **{"r": 4, "init_lora_weights": False, **settings})
    if hasattr(model, "add_adapter") and hasattr(model, "get_base_model"):
        model.add_adapter(name, config)
        model.set_adapter(name)
        adapted = model
    else:
        adapted = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for _, router in symphony_routers(adapted):
            graph = active_graph(router.symphony)
            values = torch.rand(graph.num_experts, graph.num_experts)
            graph.adjacency.copy_(values + values.T)
            graph.updates.add_(7)
            if settings.get("router") == "train":
                linear_of(router, router.contract.linear).weight.mul_(1.5)
    return adapted


def adapted_model(family="olmoe", **settings):
    return adapt(symphonize(make_model(family), decay=DECAY), **settings).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=make_ids()).logits


def assert_same_graphs(ours, others):
    graphs, wanted = expert_graphs(ours), expert_graphs(others)
    assert len(graphs) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(graphs.values(), wanted.values(), strict=True))


def refuses(model, folder, error, message, **settings):
    """Check that `load_adapter` raises this error and leaves the model unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, config = [type(module) for module in model.modules()], model.config.to_dict()
    with pytest.raises(error, match=message):
        load_adapter(model, folder, **settings)
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in model.state_dict().items())
