"""Programs that never import symphony_hf load a Symphony checkpoint right, or are refused with the package's name."""

import json

import pytest
import torch
from clients import run_client, write_entry_points, write_format_1
from models import llava_inputs, make_ids, make_llava, make_model, move_graphs
from peft import get_peft_model
from safetensors.torch import save_file
from trainers import tiny_tokenizer
from transformers import AutoModelForCausalLM

from symphony_hf import expert_graphs, load_adapter, lora_config, symphonize, upcycle_modules

CLIENTS = """
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, MixtralConfig,
    MixtralForCausalLM, pipeline,
)
folder = sys.argv[1]


def serving():
    from transformers.cli.serving.model_manager import ModelManager

    return ModelManager("cpu", model_timeout=-1)


def adapter():
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/plain"), f"{folder}/adapter")


clients = {
    "AutoConfig": lambda: AutoConfig.from_pretrained(f"{folder}/mixtral"),
    "config class": lambda: MixtralConfig.from_pretrained(f"{folder}/mixtral"),
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(f"{folder}/mixtral"),
    "model class": lambda: MixtralForCausalLM.from_pretrained(f"{folder}/mixtral"),
    "AutoModel": lambda: AutoModel.from_pretrained(f"{folder}/mixtral"),
    "pipeline": lambda: pipeline("text-generation", f"{folder}/mixtral").model,
    "transformers serve": lambda: serving().load_model_and_processor(f"{folder}/mixtral@main")[0],
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

ADAPTER = """
import torch
from safetensors.torch import load_file
expected = load_file(f"{folder}/expected.safetensors")
assert "symphony_hf" not in sys.modules
with torch.no_grad():
    output = adapter().eval()(input_ids=expected["ids"])
found = (output.logits - expected["adapter"]).abs().max().item()
"""

REFUSED = """
found = {}
for name, load in (clients | {"PeftModel": adapter}).items():
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
    model = symphonize(make_model("mixtral"))
    adapted = move_graphs(get_peft_model(model, lora_config(model, init_lora_weights=False))).eval()
    adapted.save_pretrained(folder / "adapter")
    expected = {
        "AutoModelForCausalLM": text(ids).logits,
        "AutoModel": text.model(ids).last_hidden_state,
        "vision-language": images(**batch).logits,
        "upcycled": upcycled(**batch).logits,
        "adapter": adapted(input_ids=ids).logits,
    }
    tensors = {"ids": ids, "image_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], **expected}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "expected.safetensors")
    return folder


@pytest.mark.thorough
def test_they_load_it_right_where_the_package_is_installed(folder):
    found = run_client(CLIENTS + LOADED, folder / "site", folder)
    for name in ("AutoConfig", "config class"):
        assert found.pop(name) == ["mixtral", ["MixtralForCausalLM"]]
    assert found.pop("format 1") == "SymphonyMixtralTopKRouter"
    assert len(found) == 7
    assert {name: difference for name, difference in found.items() if not difference <= 1e-5} == {}


@pytest.mark.thorough
def test_an_adapter_brings_its_graphs_through_peft_alone(folder):
    assert run_client(CLIENTS + ADAPTER, folder / "site", folder) <= 1e-5


@pytest.mark.thorough
def test_they_are_refused_where_it_is_not(folder):
    found = run_client(CLIENTS + REFUSED, folder / "site", folder, installed=False)
    assert len(found) == 10
    # It loads the processor first, and hides why that cannot be.
    assert "Unrecognized processing class" in found.pop("transformers serve")
    assert {name: error for name, error in found.items() if "symphony_hf" not in error} == {}
    for name in ("model class", "PeftModel"):
        assert "pip install symphony-hf" in found[name]


TRL = """
from trl.scripts.sft import main, make_parser
words = ["--model_name_or_path", sys.argv[1] + "/mixtral", "--dataset_name", sys.argv[1] + "/text", "--output_dir",
         sys.argv[2], "--max_steps", "1", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
         "--learning_rate", "0", "--save_strategy", "no", "--per_device_train_batch_size", "1", *sys.argv[3:]]
main(*make_parser().parse_args_and_config(words, fail_with_unknown_args=False))
found = "symphony_hf" in sys.modules
"""


@pytest.mark.clients
def test_trls_sft_script(folder, tmp_path):
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "train.jsonl").write_text(json.dumps({"text": "w3 w4 w5 w6"}) + "\n")
    assert run_client(TRL, folder / "site", folder, tmp_path / "run")
    trained, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run", folder / "mixtral"))
    assert all(not torch.equal(graph, expert_graphs(before)[name]) for name, graph in expert_graphs(trained).items())
    with pytest.raises(AssertionError, match="model type `symphony_hf`"):
        run_client(TRL, folder / "site", folder, tmp_path / "refused", installed=False)
    assert not list((tmp_path / "refused").glob("*.safetensors"))


@pytest.mark.clients
def test_trls_sft_script_with_peft(folder, tmp_path):
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "train.jsonl").write_text(json.dumps({"text": "w3 w4 w5 w6"}) + "\n")
    run_client(TRL, folder / "site", folder, tmp_path, "--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    before, base = (AutoModelForCausalLM.from_pretrained(folder / "mixtral") for _ in range(2))
    trained = expert_graphs(load_adapter(base, tmp_path))
    for name, graph in expert_graphs(before).items():
        assert not torch.equal(graph, trained[f"base_model.model.{name}"])


EVALUATION = """
from lm_eval.models.huggingface import HFLM
try:
    model = HFLM(pretrained=sys.argv[1] + "/mixtral", device="cpu", batch_size=1)
    found = type(model.model.model.layers[0].mlp.gate).__name__
except ValueError as error:
    found = str(error)
"""


@pytest.mark.clients
@pytest.mark.parametrize(("installed", "expected"), [(True, "SymphonyMixtralTopKRouter"), (False, "`symphony_hf`")])
def test_lm_evaluation_harness(folder, installed, expected):
    pytest.importorskip("lm_eval")
    assert expected in run_client(EVALUATION, folder / "site", folder, installed=installed)
