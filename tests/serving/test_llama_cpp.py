"""llama.cpp serves folded checkpoints: its greedy tokens are those of Transformers, for every sequence.

The script that converts checkpoints is in the source archive of llama-cpp-python alone, which `.ci/clients` unpacks in
the environment. `SYMPHONY_HF_LLAMA_CPP_SOURCE` names another folder of llama.cpp, and `SYMPHONY_HF_LLAMA_CPP_PYTHON`
the Python of another environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clients import greedy_tokens
from models import VOCAB, make_model, move_graphs

from symphony_hf import export_folded, symphonize

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

PYTHON = os.environ.get("SYMPHONY_HF_LLAMA_CPP_PYTHON", sys.executable)
FAMILIES = {"mixtral": {}, "olmoe": {"num_key_value_heads": 4}, "qwen3_moe": {}}  # its OLMoE has no grouped heads

CONVERT = """
import runpy
import sys
root, folder, output = sys.argv[1:]
sys.path[:0] = [root, root + "/gguf-py"]
import json
from conversion import get_model_class
(architecture,) = json.load(open(folder + "/config.json"))["architectures"]


def without_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


get_model_class(architecture).set_vocab = without_vocabulary  # the checkpoints have no tokenizer
sys.argv = [root + "/convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", output]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

GENERATE = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, prompts, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=64, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False)
found = []
for ids in prompts:
    model.reset()
    model._ctx.kv_cache_clear() if hasattr(model._ctx, "kv_cache_clear") else None
    model.eval(ids)
    found.append([])
    for _ in range(length):
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),))
        found[-1].append(int(logits.argmax()))
        model.eval(found[-1][-1:])
print("found:" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def source():
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not installed: `.ci/clients`, or its Python in SYMPHONY_HF_LLAMA_CPP_PYTHON")
    given = os.environ.get("SYMPHONY_HF_LLAMA_CPP_SOURCE")
    found = [Path(given)] if given else sorted(Path(sys.prefix).glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        pytest.skip("llama.cpp's source is not there: `.ci/clients`, or its folder in SYMPHONY_HF_LLAMA_CPP_SOURCE")
    return found[0]


def generate(source, folder, prompts, length=16):
    """Convert a checkpoint, and return the greedy tokens of llama.cpp."""
    output = folder / "model.gguf"
    for command in (
        [sys.executable, "-c", CONVERT, str(source), str(folder), str(output)],
        [PYTHON, "-c", GENERATE, str(output), json.dumps(prompts), str(length)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("found:")[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_a_folded_checkpoint_are_those_of_transformers(family, source, tmp_path):
    model = make_model(family, hidden_size=128, **FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so large that no rounding decides a token
    model = move_graphs(symphonize(model))
    export_folded(model, tmp_path)
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in range(5, 13)]
    assert generate(source, tmp_path, prompts) == greedy_tokens(model, prompts)
