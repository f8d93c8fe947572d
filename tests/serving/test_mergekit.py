"""mergekit merges folded checkpoints, and unfolded ones with their graphs, where this package is installed."""

import json

import pytest
import torch
import yaml
from models import make_model, move_graphs
from transformers import AutoModelForCausalLM

from symphony_hf import expert_graphs, export_folded, symphonize

pytestmark = pytest.mark.clients

CONFIG = """
merge_method: linear
dtype: float32
models:
  - {{model: {folder}/{first}, parameters: {{weight: 0.25}}}}
  - {{model: {folder}/{second}, parameters: {{weight: 0.75}}}}
"""


def merge(folder, first, second):
    config = pytest.importorskip("mergekit.config")
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    settings = config.MergeConfiguration.model_validate(
        yaml.safe_load(CONFIG.format(folder=folder, first=first, second=second))
    )
    run_merge(settings, str(folder / "merged"), MergeOptions(copy_tokenizer=False, cuda=False))


def test_folded_checkpoints_are_merged(tmp_path):
    parts = []
    for seed in range(2):
        model = move_graphs(symphonize(make_model("mixtral", seed=seed)), seed=seed)
        export_folded(model, tmp_path / f"model{seed}", tokenizer=False)
        parts.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"model{seed}").state_dict())
    merge(tmp_path, "model0", "model1")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * parts[0][name] + 0.75 * parts[1][name])


def test_graphs_of_unfolded_checkpoints_are_merged_like_other_tensors(tmp_path):
    parts = []
    for seed in range(2):
        model = move_graphs(symphonize(make_model("mixtral", seed=seed)), seed=seed)
        model.save_pretrained(tmp_path / f"model{seed}")
        parts.append(expert_graphs(model))
    merge(tmp_path, "model0", "model1")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [
        "SymphonyMixtralForCausalLM"
    ]
    merged = expert_graphs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert merged.keys() == parts[0].keys()
    for name, graph in merged.items():
        torch.testing.assert_close(graph, 0.25 * parts[0][name] + 0.75 * parts[1][name])
