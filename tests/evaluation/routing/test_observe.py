"""`symphony routing`: its numbers against loops over single windows, what it refuses, and what it leaves out."""

import json
import shutil
from io import StringIO
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from grammar import save
from models import COMMON, make_model, move_graphs
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from symphony_hf import expert_graphs, symphonize
from symphony_hf.cli import app
from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, DataError, UnsupportedModelError
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS, attack_documents
from symphony_hf.evaluation.routing import observe
from symphony_hf.evaluation.routing.metrics import compare_attacked
from symphony_hf.evaluation.routing.observe import observe_routing
from symphony_hf.evaluation.routing.pictures import _draw_flips
from symphony_hf.evaluation.routing.records import RoutingRecord, _spread
from symphony_hf.evaluation.routing.settings import RoutingSettings
from symphony_hf.evaluation.routing.tables import _corruption_table, print_observation
from symphony_hf.evaluation.routing.texts import CLASS_NAMES, DISTANCE_NAMES, AttackedForm, Form, ObservedTexts
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.experiments.bench.evaluation import noted_calls
from symphony_hf.experiments.conformance.tiny import tiny_model

TOP_K, EXPERTS, BLOCK = 3, 8, 24


def settings(model, data, output, **changes):
    usual = {"split": "all", "severities": (3,), "block_size": BLOCK, "batch_size": 5, "similarity_tokens": 16}
    return RoutingSettings(model=model, data=data, output=str(output), **(usual | changes))


@pytest.fixture(scope="module")
def observed(checkpoints, data, tmp_path_factory):
    early, late = checkpoints
    output = tmp_path_factory.mktemp("routing")
    return observe_routing(settings(late, data, output, against=(early,))), output


def naive(path, words, text):
    """Return each word's experts and margin by layer, one window at a time, each after an end-of-text token."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = words(text)["input_ids"]
    layers = [[] for _ in model.model.layers]
    for start in range(0, len(ids), BLOCK - 1):
        window = torch.tensor([[words.eos_token_id, *ids[start : start + BLOCK - 1]]])
        with torch.no_grad():
            logits = model(window, output_router_logits=True).router_logits
        for layer, values in zip(layers, logits, strict=True):
            for row in values[1:]:
                top = row.topk(TOP_K + 1)
                layer.append((set(top.indices[:TOP_K].tolist()), float(top.values[TOP_K - 1] - top.values[TOP_K])))
    return layers


@pytest.fixture(scope="module")
def by_loops(checkpoints, texts, words):
    """Return results of `naive` by form and document: the late checkpoint clean and attacked, and the early one."""
    documents = [Document(name, text) for name, text in texts.items()]
    attacked = attack_documents(documents, TEXT_ATTACKS["aaa"], TEXT_ATTACKS["aaa"].rate(3), 0)
    late = {document.name: naive(checkpoints[1], words, document.text) for document in documents}
    early = {document.name: naive(checkpoints[0], words, document.text) for document in documents}
    return (
        late,
        {document.name: (document.text, naive(checkpoints[1], words, document.text)) for document in attacked},
        early,
    )


@pytest.mark.thorough
def test_layers_equal_loops_over_words(observed, by_loops):
    result, late = observed[0], by_loops[0]
    for place, router in enumerate(result["routers"]):
        layer = result["layers"][router]
        sets = [chosen for layers in late.values() for chosen, _ in layers[place]]
        load = np.array([sum(expert in chosen for chosen in sets) for expert in range(EXPERTS)])
        np.testing.assert_allclose(layer["load"], load / load.sum())
        margins = [margin for layers in late.values() for _, margin in layers[place]]
        # Padded batches sum in another order; logits are of order 10.
        assert layer["margin"]["p50"] == pytest.approx(np.median(margins), abs=1e-4)
        for domain in ("a", "b"):
            own = [chosen for name, layers in late.items() if name[0] == domain for chosen, _ in layers[place]]
            shares = [sum(expert in chosen for chosen in own) / len(own) for expert in range(EXPERTS)]
            np.testing.assert_allclose(layer["allocation"][domain], shares)
    assert result["domains"].keys() == {"a", "b"}
    assert sum(result["domains"].values()) == result["documents"]["tokens"] == len(sets)


@pytest.mark.thorough
def test_changes_under_attack_equal_loops_over_words(observed, by_loops, texts):
    result, (late, attacked, _) = observed[0], by_loops
    (row,) = result["corruption"]
    for place, router in enumerate(result["routers"]):
        changed, distances = [], []
        for name, layers in late.items():
            before, after = texts[name].split(), attacked[name][0].split()
            last_edit = None
            for position, (word, new) in enumerate(zip(before, after, strict=True)):
                if position % (BLOCK - 1) == 0:
                    last_edit = None
                if word != new:
                    last_edit = position
                    continue
                kept = layers[place][position][0] & attacked[name][1][place][position][0]
                changed.append(1 - len(kept) / TOP_K)
                distances.append(None if last_edit is None else position - last_edit)
        changed = np.array(changed)
        assert row["tokens"] == len(changed)
        assert row["per_layer"][router] == pytest.approx(changed.mean())
        assert row["flips_per_layer"][router] == pytest.approx((changed > 0).mean())
        by_distance = row["by_distance"][router]
        assert by_distance[-1] == changed[[distance is None for distance in distances]].mean() == 0.0
        assert by_distance[0] == pytest.approx(changed[[distance == 1 for distance in distances]].mean())
        assert by_distance[2] == pytest.approx(changed[[d is not None and 4 <= d <= 7 for d in distances]].mean())
    rate = row["change_rate"]
    assert rate["estimate"] == pytest.approx(np.mean(list(row["per_layer"].values())))
    assert rate["low"] < rate["estimate"] < rate["high"]


@pytest.mark.thorough
def test_no_attack_changes_routing_before_its_first_edit(checkpoints, data, tmp_path):
    """The models are causal, so this is exact, also where words are missing or in another order."""
    changes = {"attacks": tuple(TEXT_ATTACKS), "severities": (5,), "similarity_tokens": 0, "drop_first": False}
    result = observe_routing(settings(checkpoints[1], data, tmp_path, **changes))
    for row in result["corruption"]:
        for rates in row["by_distance"].values():
            assert rates[0] > 0, row["attack"]
            assert rates[-1] == 0, row["attack"]


def test_windows_that_are_longer_than_the_context_are_refused_before_weights_are_read(
    checkpoints, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(observe.RoutedModel, "model", property(lambda self: pytest.fail("weights are read")))
    for checkpoint in checkpoints:  # the model, and an earlier checkpoint
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        short = shutil.copytree(checkpoint, tmp_path / Path(checkpoint).name)
        (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
        models = (str(short), ()) if checkpoint == checkpoints[1] else (checkpoints[1], (str(short),))
        with pytest.raises(
            ConfigError, match=rf"^routing: .*24 tokens, and `{short}` takes 16: set --block_size to 16 or less"
        ):
            observe_routing(settings(models[0], data, tmp_path / "out", against=models[1]))


def test_attacked_windows_that_are_longer_than_the_context_are_refused_before_weights_are_read(
    checkpoints, data, tmp_path, monkeypatch
):
    """An attack that doubles the text, in windows that clean text fits into."""
    monkeypatch.setattr(observe.RoutedModel, "model", property(lambda self: pytest.fail("weights are read")))
    monkeypatch.setattr("symphony_hf.evaluation.documents.attack_documents", twice)
    with pytest.raises(ConfigError, match=r"^routing: aaa-3-seed0: .* takes 128: set --block_size to about 68 or less"):
        observe_routing(settings(checkpoints[1], data, tmp_path, block_size=128))


def twice(documents, *settings):
    return [Document(document.name, f"{document.text} {document.text}") for document in documents]


@pytest.mark.thorough
def test_checkpoints_are_compared_with_the_last(observed, by_loops):
    result, (late, _, early) = observed[0], by_loops
    first, last = result["checkpoints"]
    for place, router in enumerate(result["routers"]):
        pairs = [(a[0], b[0]) for name in late for a, b in zip(early[name][place], late[name][place], strict=True)]
        saturation = sum(len(a & b) / TOP_K for a, b in pairs) / len(pairs)
        assert first["saturation"][router] == pytest.approx(saturation)
        assert first["drift"][router] > 0
        assert last["saturation"][router] == 1.0
        assert last["drift"][router] == 0.0
        assert last["load"][router] == result["layers"][router]["load"]


def test_untouched_tokens_of_few_documents_have_no_interval():
    clean = {"router": RoutingRecord(torch.arange(40, dtype=torch.int16).view(20, 2), torch.ones(20))}
    texts = ObservedTexts("", 20, Form({}, [1] * 20), {}, ["all"], np.zeros(20, int), np.zeros(20, int))
    for kept in (0, 9, 10):
        own = np.arange(kept)
        form = AttackedForm(texts.clean, own, own, own, np.zeros(kept, int))
        row = compare_attacked(AttackCase("aaa", 1, 0), form, clean, clean, texts)
        assert (row["change_rate"] is None) == (kept < 10)
        assert row["per_layer"] == {"router": 0.0 if kept else None}
        result = {"routers": ["router"], "corruption": [row], "distances": DISTANCE_NAMES, "classes": CLASS_NAMES}
        _corruption_table(result).print(Console(file=StringIO()))
        assert len(list(_draw_flips(Mock(), result, Path()))) == (kept > 0)


def test_windows_that_experts_are_compared_on_have_enough_tokens_and_are_of_the_whole_text():
    flat = [torch.zeros(length, dtype=torch.int64) for length in [50] + [5] * 99]
    for num_tokens, expected in ((4, 8), (90, 16), (10_000, 100)):
        spread = _spread(flat, num_tokens)
        assert len(spread) == expected
        assert sum(len(window) - 1 for window in spread) >= min(num_tokens, 49 + 99 * 4)


def test_the_loss_without_the_first_expert(observed):
    """Its head against loops is in the tests of `watching`; here, that a trained model loses by it."""
    dropped = observed[0]["drop_first"]
    assert dropped["loss_without"] - dropped["loss"] == pytest.approx(dropped["difference"]["estimate"])
    assert dropped["ratio"]["estimate"] == pytest.approx(np.exp(dropped["difference"]["estimate"]))
    assert dropped["difference"]["low"] > 0


def test_the_clean_text_is_run_once_for_its_routing_and_its_loss(checkpoints, data, tmp_path):
    path = checkpoints[1]
    results, calls = [], []
    for drop_first in (True, False):
        options = {"attacks": (), "similarity_tokens": 0, "drop_first": drop_first}
        with noted_calls() as noted:
            results.append(observe_routing(settings(path, data, tmp_path, **options)))
        calls.append(len(noted))
    assert calls[0] == 2 * calls[1]  # with and without the first expert
    assert results[0]["overall"] == results[1]["overall"]


def test_matrices_are_beside_the_result(observed):
    result, output = observed
    assert json.loads((output / "result.json").read_text())["overall"] == result["overall"]
    matrices = load_file(output / "matrices.safetensors")
    kinds = ("coselection", "coactivation", "similarity", "checkpoint/0/coselection", "checkpoint/1/coselection")
    assert matrices.keys() == {f"{kind}/{router}" for kind in kinds for router in result["routers"]}
    for router in result["routers"]:
        graph = matrices[f"coselection/{router}"]
        assert torch.equal(graph, matrices[f"checkpoint/1/coselection/{router}"])
        np.testing.assert_allclose(graph.diagonal() / TOP_K, result["layers"][router]["load"], rtol=1e-6)


def test_a_symphonized_model_shows_its_learned_graphs_too(tmp_path, words, data):
    model = move_graphs(symphonize(make_model("mixtral", vocab_size=len(words), max_position_embeddings=128)))
    path = save(tmp_path / "model", model, words)
    result = observe_routing(settings(path, data, tmp_path, attacks=(), similarity_tokens=0, drop_first=False))
    matrices = load_file(tmp_path / "matrices.safetensors")
    for router, graph in expert_graphs(model).items():
        assert torch.equal(matrices[f"learned/{router}"], graph)
        assert result["layers"][router]["learned_graph"]["neighbours"] > 0
        assert result["layers"][router]["similarity"] is None
    assert (result["corruption"], result["drop_first"], result["checkpoints"]) == ([], None, [])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("deepseek_v3", {}),
        ("jetmoe", {"similarity": "no module `experts`"}),
        ("switch_transformers", {"similarity": "no module `experts`", "drop_first": "does not predict the next token"}),
        ("openai_privacy_filter", {"drop_first": "does not predict the next token"}),
        ("zaya", {"similarity": "it chooses from 9, and ZayaExperts holds 8"}),
    ],
)
def test_what_a_family_cannot_be_measured_on_is_said(tmp_path, words, data, family, missing):
    path = save(tmp_path / "model", tiny_model(family), words)
    result = observe_routing(settings(path, data, tmp_path, attacks=()))
    assert result["unavailable"].keys() == missing.keys()
    for name, reason in missing.items():
        assert reason in result["unavailable"][name]
    shares = [layer["margin"]["not_by_logits"] for layer in result["layers"].values()]
    assert (max(shares) > 0) == (family in ("deepseek_v3", "zaya"))  # which choose with a bias
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in result["layers"].values())


@pytest.mark.thorough
def test_a_loss_that_is_not_compared_need_not_be_finite(tmp_path, words, data):
    model = tiny_model("inkling_text")
    with torch.no_grad():
        model.get_output_embeddings().weight[1] = torch.nan
    result = observe_routing(settings(save(tmp_path / "model", model, words), data, tmp_path, attacks=()))
    assert "first expert" in result["unavailable"]["drop_first"] or result["drop_first"] is None
    assert result["layers"]


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path, words, data):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no router found in LlamaForCausalLM"):
        observe_routing(settings(str(tmp_path), data, tmp_path))


def test_another_models_checkpoint_is_refused(tmp_path, checkpoints, words, data):
    path = save(tmp_path / "other", make_model("mixtral", vocab_size=len(words)), words)
    with pytest.raises(ConfigError, match=r"choose 2 of 6 .*choose 3 of 8 .*of the same model"):
        observe_routing(settings(checkpoints[1], data, tmp_path, against=(path,)))


def test_too_few_documents_and_bad_settings_are_refused(tmp_path, checkpoints, data):
    with pytest.raises(DataError, match="intervals need 10"):
        observe_routing(settings(checkpoints[1], data, tmp_path, documents=9))
    with pytest.raises(ConfigError, match="`words` must be at least 1"):
        settings("m", data, tmp_path, words=0)
    with pytest.raises(ConfigError, match="`similarity_tokens` must be 0, or at least 4"):
        settings("m", data, tmp_path, similarity_tokens=3)
    for changes, match in (
        ({"documents": 0}, "^routing: `documents` must be at least 1, got 0"),
        ({"dtype": "int8"}, "^routing: `dtype` must be one of"),
        ({"attacks": ["all-images"]}, r"^routing: all-images .* and symphony routing attacks text: .*, word_shuffle$"),
    ):
        with pytest.raises(ConfigError, match=match) as refused:
            settings("m", data, tmp_path, **changes)
        assert "--task" not in str(refused.value)


def test_names_are_printed_letter_by_letter(observed):
    result = {**observed[0], "documents": observed[0]["documents"] | {"source": "texts/[lr2]"}}
    result["settings"] = result["settings"] | {"model": "runs/[/x]/final"}
    result["checkpoints"] = [row | {"source": f"runs/[lr{n}]"} for n, row in enumerate(result["checkpoints"])]
    result["unavailable"] = {"similarity": "not in [lr3]"}
    page = StringIO()
    print_observation(result, Console(width=200, file=page))
    for name in ("texts/[lr2]", "runs/[/x]/final", "[lr0]", "[lr1]", "not in [lr3]"):
        assert name in page.getvalue()


@pytest.mark.thorough
def test_the_command(tmp_path, checkpoints, data):
    early, late = checkpoints
    command = ["routing", late, "--against", early, "--data", data, "--split", "all", "--words", "20"]
    command += ["--severity", "1,5", "--block_size", "24", "--output", str(tmp_path), "--similarity_tokens", "8"]
    outcome = CliRunner().invoke(app, command, catch_exceptions=False)
    assert outcome.exit_code == 0
    pictures = {"graphs", "network", "similarity", "allocation", "flips", "load", "evolution", "saturation"}
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert "8 pictures" in outcome.output
    assert "saturation" in outcome.output
    assert "layer 2" in outcome.output
    assert "Without each token's first expert" in outcome.output


def test_a_used_folder_keeps_nothing_of_an_earlier_observation(tmp_path, checkpoints, data, monkeypatch):
    """At no moment does it have both a result and another observation's files; what is not its own stays."""
    _, late = checkpoints
    earlier = ["matrices.safetensors", "graphs.png", "learned.png", "flips-keyboard.png", "load.png"]
    record = {"layers": {}, "versions": {"symphony_hf": "0.1.0"}, "corruption": [{"attack": "keyboard"}]}

    def fill():
        for name in (*earlier, "notes.png", "flips-mine.png"):
            (tmp_path / name).write_text("of before")
        (tmp_path / "result.json").write_text(json.dumps(record))

    def names():
        return {path.name for path in tmp_path.iterdir()}

    short = settings(late, data, tmp_path, similarity_tokens=0, drop_first=False, attacks=())
    removed, unlink = [], Path.unlink
    fill()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: (removed.append(path.name), unlink(path, **options)))
        observe_routing(short)
    assert removed[:2] == ["matrices.safetensors", "graphs.png"]
    assert "result.json" in removed
    assert names() == {"result.json", "matrices.safetensors", "notes.png", "flips-mine.png"}
    assert "routers" in json.loads((tmp_path / "result.json").read_text())
    for writer, left in (("write_json", set()), ("_write_matrices", {"result.json"})):
        fill()
        with monkeypatch.context() as patch:
            patch.setattr(observe, writer, lambda *arguments: pytest.fail("killed", pytrace=False))
            with pytest.raises(pytest.fail.Exception):
                observe_routing(short)
        assert names() == {*left, "notes.png", "flips-mine.png"}
    observe_routing(short)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"has `matrices.safetensors`, which no run of symphony_hf wrote"):
        observe_routing(short)


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"routing: .*because `.*file` is a file"):
        observe_routing(settings("no such model", data, tmp_path / "file"))
