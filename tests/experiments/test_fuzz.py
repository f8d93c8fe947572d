"""Tampered files, a few of `symphony check fuzz`'s ten thousand; and what it says of a loader that is broken."""

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from models import make_ids, make_model, move_graphs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from symphony_hf import CheckpointError, GraphError, expert_graphs, load_adapter, load_checkpoint, symphonize
from symphony_hf.cli import app
from symphony_hf.errors import EvaluationError
from symphony_hf.experiments.fuzzing import campaign, mutations
from symphony_hf.experiments.fuzzing.campaign import MemoryPeak, try_case
from symphony_hf.experiments.fuzzing.specimens import make_base, make_specimens
from symphony_hf.patching.expert_graph import ExpertGraph

CASES = 200


@pytest.fixture(scope="module")
def specimens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specimens")
    make_specimens(folder)
    return folder


@pytest.fixture
def _quiet():
    """Transformers prints a table of every checkpoint that it refuses."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def only_graphs(monkeypatch):
    def choose(kind, change=None):
        monkeypatch.setattr(campaign, "SPECIMENS", ("graphs",))
        ways = {kind: change or mutations.MUTATIONS["graphs"][kind]}
        monkeypatch.setattr(campaign, "MUTATIONS", {"graphs": ways})

    return choose


@pytest.mark.thorough
@pytest.mark.usefixtures("_quiet")
def test_every_case_is_loaded_with_valid_graphs_or_refused(specimens):
    outcomes = [try_case(case, 0, specimens) for case in range(CASES)]
    assert [outcome for outcome in outcomes if outcome.verdict == "failed"] == []
    verdicts = collections.Counter(outcome.verdict for outcome in outcomes)
    assert min(verdicts["loaded"], verdicts["refused"]) > CASES // 10
    tried = {(outcome.specimen, outcome.target) for outcome in outcomes}
    assert tried == {(specimen, target) for specimen, targets in mutations.MUTATIONS.items() for target in targets}


@pytest.mark.thorough
@pytest.mark.usefixtures("_quiet")
def test_a_case_is_the_same_each_time(specimens):
    def told(seed):
        return [(outcome.change, outcome.verdict) for outcome in (try_case(case, seed, specimens) for case in range(8))]

    assert told(3) == told(3)
    assert told(3) != told(4)


@pytest.mark.thorough
@pytest.mark.usefixtures("_quiet")
def test_a_loader_that_does_not_look_at_its_graphs_is_caught(specimens, only_graphs, monkeypatch):
    only_graphs("graph")
    assert not [case for case in range(15) if try_case(case, 0, specimens).verdict == "failed"]
    monkeypatch.setattr("symphony_hf.patching.from_pretrained.adjacency_problems", lambda *arguments: [])
    told = [outcome.detail for case in range(30) if (outcome := try_case(case, 0, specimens)).verdict == "failed"]
    assert any("non-finite entries" in detail for detail in told)
    assert any("not symmetric" in detail for detail in told)


@pytest.mark.usefixtures("_quiet")
def test_a_loader_that_loses_its_graphs_is_caught(specimens, only_graphs, monkeypatch):
    def load(folder, base):
        model = load_checkpoint(folder)
        for graph in model.modules():
            if isinstance(graph, ExpertGraph):
                graph.reset()
        return model

    only_graphs("graph", lambda folder, rng: "nothing")
    monkeypatch.setattr(campaign, "_load", load)
    assert "the stored graph is lost" in try_case(0, 0, specimens).detail


@pytest.mark.usefixtures("_quiet")
def test_a_loader_that_lets_other_errors_out_is_caught(specimens, only_graphs, monkeypatch):
    only_graphs("header")
    monkeypatch.setattr("symphony_hf.checkpoints.untrusted._REFUSALS", (ArithmeticError,))
    told = [outcome.detail for case in range(20) if (outcome := try_case(case, 0, specimens)).verdict == "failed"]
    assert any(detail.startswith("SafetensorError") for detail in told)


@pytest.mark.usefixtures("_quiet")
def test_a_loader_that_allocates_what_a_config_asks_for_is_caught(specimens, only_graphs, monkeypatch):
    def ask_for_more(folder, rng):
        config = json.loads((folder / "config.json").read_text())
        config |= {"vocab_size": 2**21, "tie_word_embeddings": False}  # 2 x 128 MiB
        (folder / "config.json").write_text(json.dumps(config))
        return "vocab_size"

    only_graphs("config", ask_for_more)
    refused = try_case(0, 0, specimens)
    assert (refused.verdict, "asks for" in refused.detail) == ("refused", True)
    monkeypatch.setattr("symphony_hf.checkpoints.untrusted._check_size", lambda *arguments: None)
    if sys.platform == "linux":
        assert "bytes of memory, where" in try_case(0, 0, specimens).detail


def test_a_loader_that_hangs_is_caught(specimens, only_graphs, monkeypatch):
    only_graphs("graph")
    monkeypatch.setattr(campaign, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(campaign, "load_checkpoint", lambda folder: time.sleep(5))
    assert try_case(0, 0, specimens).detail == "not done after 0.05 seconds"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_memory_is_what_the_kernel_gave():
    with MemoryPeak() as memory:
        tensor = torch.ones(2**24)  # 64 MiB; the kernel adds pages up by threads, and may be some behind
    del tensor
    assert memory.taken > 2**26 - 2**20 or sys.platform != "linux"


def test_a_process_that_ends_before_its_first_case_ends_the_campaign(monkeypatch):
    def outcomes_of(*sent):
        child = mock.MagicMock(exitcode=1)  # the process and its pipe's end
        child.recv.side_effect = [*sent, EOFError]
        context = SimpleNamespace(Pipe=lambda duplex: (child, child), Process=lambda **_: child)
        monkeypatch.setattr(campaign.multiprocessing, "get_context", lambda kind: context)
        return list(campaign._in_a_process(range(5, 9), 0, None))

    with pytest.raises(EvaluationError, match="check fuzz: the process ended with 1 before its first case"):
        outcomes_of()
    done = campaign.Outcome(5, "graphs", "header", "cut", "refused")
    first, second = outcomes_of(None, done)  # ready, one case, and the end in the next
    assert first == done
    assert (second.case, second.verdict, second.detail) == (6, "failed", "the process ended with 1")


@pytest.mark.slow
@pytest.mark.once
def test_the_command_goes_on_after_a_process_that_died(monkeypatch):
    """The process is another one, so nothing but the seed and the numbers reaches it."""
    assert CliRunner().invoke(app, ["check", "fuzz", "--cases", "0"]).exit_code == 1
    done = CliRunner().invoke(app, ["check", "fuzz", "--cases", "30", "--seed", "5"])
    assert done.exit_code == 0, done.output
    assert "30 tampered files" in done.output
    with pytest.raises(EvaluationError, match="check fuzz: the process ended with 1 before its first case"):
        next(campaign._in_a_process(range(3), 0, os.devnull))  # no specimens there


# load_checkpoint itself.


@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_a_checkpoint_is_loaded_as_its_auto_class_loads_it(shards, tmp_path):
    model, ids = move_graphs(symphonize(make_model("mixtral"))), make_ids()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = load_checkpoint(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for name, graph in expert_graphs(model).items():
        assert torch.equal(expert_graphs(loaded)[name], graph)
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {graph.dtype for graph in expert_graphs(half).values()} == {torch.float32}


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of a checkpoint is not run"),
        ({"quantization_config": {"quant_method": "x"}}, "quantized"),
        ({"architectures": ["SymphonyNoneSuch"]}, "no model class NoneSuch"),
        ({"architectures": None}, "no model class in its config"),
        ({"num_hidden_layers": 10**9}, r"asks for far more modules than the \d+ tensors of the files can fill"),
        ({"hidden_size": 2**20}, "asks for .* weights, and the files have"),
        ({"vocab_size": -1}, "no model can be built from it"),
        ({"hidden_act": "none such"}, "no model can be built from it"),
        ({"num_attention_heads": "4"}, "no model can be built from it"),
    ],
)
def test_what_a_config_may_not_say(values, message, tmp_path):
    symphonize(make_model()).save_pretrained(tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_weights_that_transformers_would_draw_at_random_are_missed(tmp_path):
    symphonize(make_model()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["elsewhere"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 .*model\.norm\.weight"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("symphony", [None, {"layers": [0]}])
def test_graphs_that_would_be_left_out_are_missed(symphony, specimens, tmp_path):
    shutil.copytree(specimens / "graphs", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, symphony=symphony)
    with pytest.raises(GraphError, match=r"graphs that its config\.json has no settings for \(.*symphony\.adjacency"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("number", [4097, 2**31])
def test_experts_that_are_not_there_are_not_allocated(number, specimens, tmp_path):
    shutil.copytree(specimens / "graphs", tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, num_local_experts=number)
    with pytest.raises(CheckpointError, match="asks for") as error, MemoryPeak() as memory:
        load_checkpoint(tmp_path)
    assert error.value.__cause__ is None
    assert memory.taken < 2**22


def test_an_adapter_is_no_checkpoint(specimens):
    with pytest.raises(CheckpointError, match="load_adapter"):
        load_checkpoint(specimens / "adapter")


@pytest.mark.parametrize("number", [-1, -(2**63)])
def test_a_warm_up_that_is_turned_around_is_refused(number, specimens, tmp_path):
    tensors = load_file(specimens / "graphs" / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("updates"))
    tensors[name].fill_(number)
    tmp_path.joinpath("config.json").write_text((specimens / "graphs" / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraphError, match=rf"updates: {number}, where a number of updates"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_adapters_warm_up_and_graphs_are_looked_at_too(specimens, tmp_path):
    def spoiled(suffix, change):
        tensors = load_file(specimens / "adapter" / "adapter_model.safetensors")
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        tensors[name] = change(tensors[name])
        shutil.copytree(specimens / "adapter", tmp_path, dirs_exist_ok=True)
        save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        return tmp_path

    for change in (lambda updates: updates.fill_(-1), lambda updates: updates.double()):
        with pytest.raises(GraphError, match="a whole number of at least 0"):
            load_adapter(make_base(), spoiled("updates", change))
    for change in (lambda graph: graph.fill_(3e38), lambda graph: graph.fill_(1e20).fill_diagonal_(1e-30)):
        with pytest.raises(GraphError, match="too large, or too far apart"):
            load_adapter(make_base(), spoiled("adjacency", change))


def test_mutations_change_the_file(specimens, tmp_path):
    """Each way changes the bytes of a file, or it would try nothing."""
    for specimen, ways in mutations.MUTATIONS.items():
        before = {file.name: file.read_bytes() for file in (specimens / specimen).iterdir()}
        for name, change in ways.items():
            folder = tmp_path / specimen / name
            shutil.copytree(specimens / specimen, folder)
            assert change(folder, random.Random(0))
            assert {file.name: file.read_bytes() for file in folder.iterdir()} != before
