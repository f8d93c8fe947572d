"""Programs that never import symphony_hf load a Symphony checkpoint right, or are refused with the package's name."""

import pytest
from clients import run_client, write_entry_points, write_format_1
from models import llava_inputs, make_ids, make_llava, make_model, move_graphs
from safetensors.torch import save_file
from trainers import tiny_tokenizer

from symphony_hf import symphonize, upcycle_modules

CLIENTS = """
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, MixtralConfig,
    MixtralForCausalLM, pipeline,
)
folder = sys.argv[1]
clients = {
    "AutoConfig": lambda: AutoConfig.from_pretrained(f"{folder}/mixtral"),
    "config class": lambda: MixtralConfig.from_pretrained(f"{folder}/mixtral"),
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(f"{folder}/mixtral"),
    "model class": lambda: MixtralForCausalLM.from_pretrained(f"{folder}/mixtral"),
    "AutoModel": lambda: AutoModel.from_pretrained(f"{folder}/mixtral"),
    "pipeline": lambda: pipeline("text-generation", f"{folder}/mixtral").model,
    "vision-language": lambda: AutoModelForImageTextToText.from_pretrained(f"{folder}/llava"),
    "upcycled": lambda: AutoModelForImageTextToText.from_pretrained(f"{folder}/upcycled"),
}
"""

LOADED = """
import torch
from safetensors.torch import load_file
assert "symphony_hf" not in sys.modules
AutoModelForCausalLM.from_pretrained(f"{folder}/plain")
assert "symphony_hf" not in sys.modules
expected = load_file(f"{folder}/expected.safetensors")
images = {"input_ids": expected["image_ids"], "pixel_values": expected["pixel_values"]}
found = {}
for name, load in clients.items():
    loaded = load()
    if not isinstance(loaded, torch.nn.Module):
        found[name] = [loaded.model_type, loaded.architectures]
        continue
    inputs = images if hasattr(loaded.config, "vision_config") else {"input_ids": expected["ids"]}
    with torch.no_grad():
        output = loaded.eval()(**inputs)
    output = output.last_hidden_state if name == "AutoModel" else output.logits
    found[name] = (output - expected[name if name in expected else "AutoModelForCausalLM"]).abs().max().item()
found["format 1"] = type(AutoModelForCausalLM.from_pretrained(f"{folder}/old").model.layers[0].mlp.gate).__name__
"""

REFUSED = """
found = {}
for name, load in clients.items():
    try:
        load()
        found[name] = "loaded"
    except (AttributeError, ValueError) as error:
        found[name] = str(error)
assert "symphony_hf" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and what their models compute."""
    folder = tmp_path_factory.mktemp("clients")
    write_entry_points(folder / "site")
    make_model("mixtral").save_pretrained(folder / "plain")
    text, images = move_graphs(symphonize(make_model("mixtral"))), move_graphs(symphonize(make_llava()))
    upcycled = upcycle_modules(make_llava(), "*multi_modal_projector", noise=0.5)
    tiny_tokenizer().save_pretrained(folder / "mixtral")
    for name, model in {"mixtral": text, "llava": images, "upcycled": upcycled}.items():
        model.save_pretrained(folder / name)
    write_format_1(folder / "mixtral", folder / "old")
    ids, batch = make_ids(), llava_inputs()
    expected = {
        "AutoModelForCausalLM": text(ids).logits,
        "AutoModel": text.model(ids).last_hidden_state,
        "vision-language": images(**batch).logits,
        "upcycled": upcycled(**batch).logits,
    }
    tensors = {"ids": ids, "image_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], **expected}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "expected.safetensors")
    return folder


def test_they_load_it_right_where_the_package_is_installed(folder):
    found = run_client(CLIENTS + LOADED, folder / "site", folder)
    for name in ("AutoConfig", "config class"):
        assert found.pop(name) == ["mixtral", ["MixtralForCausalLM"]]
    assert found.pop("format 1") == "SymphonyMixtralTopKRouter"
    assert len(found) == 6
    assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


def test_they_are_refused_where_it_is_not(folder):
    found = run_client(CLIENTS + REFUSED, folder / "site", folder, installed=False)
    assert len(found) == 8
    assert {name: error for name, error in found.items() if "symphony_hf" not in error} == {}
    assert "pip install symphony-hf" in found["model class"]
