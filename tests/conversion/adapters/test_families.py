"""Every family: LoRA is where it learns, the adapter comes back to the bit, the base stays the base, merging agrees."""

import copy
import warnings

import pytest
import torch
from adapted import DECAY, adapt, assert_same_graphs

from symphony_hf import SymphonyWarning, expert_graphs, load_adapter
from symphony_hf.conversion.inspection.tensors import bare_name
from symphony_hf.experiments.conformance.matrix import quiet
from symphony_hf.experiments.conformance.specimen import Specimen
from symphony_hf.experiments.conformance.tiny import moe_families, why_not_built

REFUSED = {"diffusion_gemma", "doge"}  # cannot be symphonized
UNSTACKED = {"dbrx"}  # its experts' weights are no stack
FAMILIES = [f for f in moe_families() if why_not_built(f) is None and f not in REFUSED]
QUICK = {"mixtral", "jetmoe"}  # in the default run


def loss_of(outputs):
    loss = getattr(outputs, "loss", None)
    return outputs.logits.float().square().mean() if loss is None else loss


def learning(specimen, model):
    """Return the bare names of the parameters with a gradient other than zero after a training step."""
    model.zero_grad()
    loss_of(specimen.training_outputs(model)).backward()
    return {bare_name(n) for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def adapted_weight(name):
    """The base's weight that a LoRA parameter adapts."""
    return name.partition(".lora_")[0] + ".weight"


@pytest.mark.parametrize("router", ["graph", "train"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_family(tmp_path, family, router):
    with quiet():
        specimen = Specimen(family)
        model = specimen.symphonized(decay=DECAY)
        base = specimen.logits(model)
        can_learn = learning(specimen, copy.deepcopy(specimen.base))
        warnings.filterwarnings("ignore", ".*get no LoRA", SymphonyWarning)  # until `quiet` ends
        adapted = adapt(model, router=router, experts=router == "train" and family not in UNSTACKED)
        learns = learning(specimen, adapted)
        lora = {bare_name(n) for n, p in adapted.named_parameters() if p.requires_grad and ".lora_" in n}
        idle = {name for name in lora - learns if adapted_weight(name) in can_learn and ".expert_" not in name}
        assert lora & learns
        assert not idle
        wanted = specimen.logits(adapted)
        with adapted.disable_adapter():
            assert torch.equal(specimen.logits(adapted), base)
        adapted.save_pretrained(tmp_path)
        loaded = load_adapter(copy.deepcopy(specimen.base), tmp_path)
        assert torch.equal(specimen.logits(loaded), wanted)
        assert_same_graphs(loaded, adapted)
        merged = loaded.merge_and_unload()
        assert list(expert_graphs(merged)) == list(expert_graphs(specimen.symphonized()))
        # LoRA is added to weights, not to outputs; rounding may turn a choice of experts in a family with many ties.
        difference = (specimen.logits(merged) - wanted).abs().max() / wanted.abs().max()
        assert difference < 1e-3
