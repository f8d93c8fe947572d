"""vLLM serves unfolded checkpoints: its greedy tokens are those of Transformers, for every sequence.

vLLM comes with versions of torch and Transformers of its own, so it has an environment of its own. Its Python is given
in `SYMPHONY_HF_VLLM_PYTHON`; without it, vLLM is looked for in this environment.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from clients import greedy_tokens, run_client, write_entry_points
from models import COMMON, VOCAB, move_graphs
from transformers import AutoConfig, AutoModelForCausalLM

from symphony_hf import export_folded, symphonize

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]

PYTHON = os.environ.get("SYMPHONY_HF_VLLM_PYTHON", sys.executable)
SIZES = {**COMMON, "hidden_size": 128, "intermediate_size": 64, "max_position_embeddings": 256}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}  # vLLM's smallest head on a CPU
GLM = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 32},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": {"num_experts": 6, "shared_expert_intermediate_size": 64, **EXPERTS},
    "qwen3_moe": {"num_experts": 8, **EXPERTS},
    "glm4_moe": {**GLM, **EXPERTS},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
}

SERVE = """
import os
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CACHE_ROOT": sys.argv[1] + "/cache"}
"""

IN_PROCESS = """
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(sys.argv[1] + "/prompts.json"))]
settings = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True}
settings |= {"skip_tokenizer_init": True, "distributed_executor_backend": "uni"}
sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


def serve(name, **more):
    outputs = LLM(f"{sys.argv[1]}/{name}", **settings | more).generate(prompts, sampling)
    return [list(output.outputs[0].token_ids) for output in outputs]


found = {}
for name in sys.argv[2:]:
    try:
        found[name] = serve(name)
    except (ValueError, RuntimeError) as error:
        found[name] = f"{type(error).__name__}: {error}"
    cleanup_dist_env_and_memory()
"""

IN_TWO_PARTS = """
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else it wants a NUMA node for each part
from vllm import LLM, SamplingParams
prompts = [{"prompt_token_ids": ids} for ids in json.load(open(sys.argv[1] + "/prompts.json"))]
model = LLM(
    sys.argv[1] + "/mixtral", dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True,
    tensor_parallel_size=2,
)
sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
found = [list(output.outputs[0].token_ids) for output in model.generate(prompts, sampling)]
"""


def make_model(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):  # also GLM's, by which experts are chosen, and which no graph smooths
                tensor.normal_(std=0.1)
            elif tensor.dim() > 1:
                tensor.mul_(4)  # so that no rounding decides a token
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, with the tokens of Transformers with and without the graphs."""
    if subprocess.run([PYTHON, "-c", "import vllm"], capture_output=True).returncode:
        pytest.skip("vLLM is not installed: name the Python of its environment in SYMPHONY_HF_VLLM_PYTHON")
    folder = tmp_path_factory.mktemp("vllm")
    write_entry_points(folder / "site")
    prompts = [
        torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in range(5, 13)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    expected = {}
    for family in FAMILIES:
        model = make_model(family)
        plain = greedy_tokens(model, prompts)
        move_graphs(symphonize(model)).save_pretrained(folder / family)
        expected[family] = greedy_tokens(model, prompts)
        assert sum(a != b for a, b in zip(plain, expected[family], strict=True)) > 4  # the graph matters
    export_folded(AutoModelForCausalLM.from_pretrained(folder / "mixtral"), folder / "folded", tokenizer=False)
    symphonize(make_model("mixtral"), smoothing="scores").save_pretrained(folder / "scores")
    (folder / "unknown").mkdir()
    config = json.loads((folder / "olmoe" / "config.json").read_text())
    config["architectures"] = ["SymphonyNobodysForCausalLM"]
    (folder / "unknown" / "config.json").write_text(json.dumps(config))
    return folder, expected


def test_the_tokens_are_those_of_transformers(folder):
    folder, expected = folder
    names = (*FAMILIES, "folded", "scores", "unknown")
    found = run_client(SERVE + IN_PROCESS, folder / "site", folder, *names, python=PYTHON, timeout=1700)
    scores, unknown = found.pop("scores"), found.pop("unknown")
    assert found == {**expected, "folded": expected["mixtral"]}
    assert "FoldError: MixtralForCausalLM: this checkpoint smooths scores" in scores
    assert "['SymphonyNobodysForCausalLM'] are not supported for now" in unknown


def test_tensor_parallel(folder):
    folder, expected = folder
    found = run_client(SERVE + IN_TWO_PARTS, folder / "site", folder, python=PYTHON, timeout=1700)
    assert found == expected["mixtral"]
