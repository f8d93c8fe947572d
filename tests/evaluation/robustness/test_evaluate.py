"""`symphony eval` with text: its numbers against loops over single windows, its verdicts, and what it keeps."""

import dataclasses
import json
import re
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from grammar import save
from models import make_model, move_graphs
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import symphony_hf.evaluation.robustness.text as measure
from symphony_hf import symphonize
from symphony_hf.cli import app, main
from symphony_hf.compat import versions
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, DataError, EvaluationError, SymphonyWarning
from symphony_hf.evaluation.attacks.text import TEXT_ATTACKS, attack_documents
from symphony_hf.evaluation.robustness.evaluate import evaluate_robustness
from symphony_hf.evaluation.robustness.settings import RobustnessSettings
from symphony_hf.evaluation.robustness.tables import print_robustness, verdicts
from symphony_hf.evaluation.robustness.task import Store
from symphony_hf.evaluation.routing.observe import observe_routing
from symphony_hf.evaluation.routing.settings import RoutingSettings

# One float32 rounding is 6e-8 of a value; a document sums a few hundred, and batches are padded.
ROUNDING = 1e-5


def make_settings(model, data, output, **changes):
    settings = {"attacks": ("aaa",), "severities": (2, 5), "seeds": (0, 1), "block_size": 24, "batch_size": 5}
    return RobustnessSettings(model=model, data=str(data), output=str(output), **(settings | changes))


@pytest.fixture(scope="module")
def compared(trained, untrained, data_file, tmp_path_factory):
    """The trained model against the untrained one, and the folder of the result."""
    output = tmp_path_factory.mktemp("eval")
    return evaluate_robustness(make_settings(trained, data_file, output, against=untrained)), output


def naive_nll(model, ids, first):
    """Each token's, in nats: one window, no batch, no padding, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[first, *ids]])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)
    return [-float(log_probabilities[place, token]) for place, token in enumerate(ids)]


@pytest.mark.thorough
def test_levels_equal_a_loop_over_words(tmp_path, documents, word_tokenizer):
    """Each word is a token, so windows of an attacked document are the same words, and untouched ones are known."""
    model = make_model("olmoe", vocab_size=len(word_tokenizer), max_position_embeddings=128)
    path = save(tmp_path / "model", model, word_tokenizer)
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    result = evaluate_robustness(make_settings(path, data, tmp_path / "out", severities=(3,), seeds=(3,)))

    named = [Document(f"documents.jsonl[{place}]", document.text) for place, document in enumerate(documents)]
    totals = {"clean": 0.0, "attacked": 0.0, "untouched clean": 0.0, "untouched": 0.0}
    untouched, words, sizes = 0, 0, {"clean": 0, "attacked": 0}
    attacked = attack_documents(named, TEXT_ATTACKS["aaa"], 0.1, 3)
    for before, after in zip(named, attacked, strict=True):
        nll = {}
        for form, document in (("clean", before), ("attacked", after)):
            ids = [word_tokenizer.convert_tokens_to_ids(word) for word in document.text.split()]
            pieces = [ids[start : start + 23] for start in range(0, len(ids), 23)]
            nll[form] = [value for piece in pieces for value in naive_nll(model, piece, word_tokenizer.eos_token_id)]
            totals[form] += sum(nll[form])
            sizes[form] += len(document.text.encode())
        words += len(before.text.split())
        for place, (word, new) in enumerate(zip(before.text.split(), after.text.split(), strict=True)):
            if word == new:
                untouched += 1
                totals["untouched clean"] += nll["clean"][place]
                totals["untouched"] += nll["attacked"][place]

    measured = result["models"]["model"]
    (row,) = measured["attacks"]
    expected = {
        "clean": (measured["clean"]["perplexity"]["estimate"], totals["clean"] / words),
        "clean, per word": (measured["clean"]["per_word"], totals["clean"] / words),
        "clean, per byte": (measured["clean"]["per_byte"], totals["clean"] / sizes["clean"]),
        "attacked": (row["perplexity"]["estimate"], totals["attacked"] / words),
        "attacked, per byte": (row["per_byte"], totals["attacked"] / sizes["attacked"]),
        "ratio": (row["ratio"]["estimate"], (totals["attacked"] - totals["clean"]) / words),
        "untouched": (row["untouched"]["perplexity"], totals["untouched"] / untouched),
        "untouched, clean": (row["untouched"]["clean_perplexity"], totals["untouched clean"] / untouched),
        "seed": (row["seeds"]["3"], totals["attacked"] / words),
    }
    for what, (found, nats) in expected.items():
        assert found == pytest.approx(np.exp(nats), rel=ROUNDING), what
    assert row["untouched"]["share"] == pytest.approx(untouched / words)
    assert 0.8 < untouched / words < 0.99


@pytest.mark.thorough
def test_a_planted_difference_is_found(compared):
    result, _ = compared
    comparisons = result["comparisons"]
    assert comparisons["unit"] == "token"
    assert comparisons["clean"]["verdict"] == "better"
    assert comparisons["clean"]["estimate"] < 0.5
    levels = {role: model["clean"]["perplexity"]["estimate"] for role, model in result["models"].items()}
    assert comparisons["clean"]["estimate"] == pytest.approx(levels["model"] / levels["against"])
    for row in comparisons["attacks"]:
        assert row["perplexity"]["verdict"] == "better"
        assert row["untouched"]["verdict"] == "better"
        # What is learned can be lost; a model that knows nothing loses nothing.
        assert row["ratio"]["verdict"] == "worse"


@pytest.mark.thorough
def test_two_copies_are_not_distinguishable(trained, data_file, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    settings = make_settings(trained, data_file, tmp_path / "out", against=str(tmp_path / "copy"), severities=(3,))
    comparisons = evaluate_robustness(settings)["comparisons"]
    (row,) = comparisons["attacks"]
    for interval in (comparisons["clean"], row["perplexity"], row["ratio"], row["untouched"]):
        assert interval["low"] == interval["estimate"] == interval["high"] == interval["null"]
        assert interval["verdict"] == "not distinguishable"


@pytest.mark.thorough
def test_an_attack_hurts_a_model_that_has_learned(compared):
    model = compared[0]["models"]["model"]
    mild, strong, both = model["attacks"]
    assert [row["severity"] for row in model["attacks"]] == [2, 5, None]
    assert 1 < mild["ratio"]["low"] < mild["ratio"]["estimate"] < strong["ratio"]["estimate"]
    assert mild["perplexity"]["estimate"] < both["perplexity"]["estimate"] < strong["perplexity"]["estimate"]
    assert strong["untouched"]["ratio"]["low"] > 1
    assert set(mild["seeds"]) == {"0", "1"}
    assert mild["seeds"]["0"] != mild["seeds"]["1"]
    assert min(mild["seeds"].values()) < mild["perplexity"]["estimate"] < max(mild["seeds"].values())


def test_the_result_is_on_the_disk_and_says_what_it_is_of(compared, trained):
    result, output = compared
    assert json.loads((output / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["documents"]["number"] == 14
    assert result["settings"]["model"] == trained
    assert result["rates"]["aaa"][0] == 0.015
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]


def test_windows_longer_than_either_context_are_refused_before_any_text_is_read(
    trained, untrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "prepare_corpus", lambda settings: pytest.fail("text is read"))
    short = shutil.copytree(untrained, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 64}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"^eval: clean text: a window has 100 tokens, and `.*short` takes 64: set"):
        evaluate_robustness(make_settings(trained, "none", tmp_path / "out", against=str(short), block_size=100))


@pytest.mark.thorough
@pytest.mark.parametrize("is_shared", [True, False])
def test_alignments_are_found_once_and_freed(trained, untrained, word_tokenizer, data_file, tmp_path, is_shared):
    other = untrained
    if not is_shared:
        model = make_model("olmoe", vocab_size=len(word_tokenizer), max_position_embeddings=128)
        other = save(tmp_path / "words", model, word_tokenizer)
    task = measure.TextTask(make_settings(trained, data_file, tmp_path, against=other), Store(tmp_path / "cells"))
    assert len(task._forms) == (5 if is_shared else 0)
    assert len(task._untouched) == (4 if is_shared else 0)
    for form in task._forms.values():
        assert all(own.dtype == np.int32 for tokens in form.documents for own in (tokens.ids, tokens.lines))
    with pytest.MonkeyPatch.context() as patch:
        if is_shared:
            patch.setattr(measure, "find_untouched", lambda *forms: pytest.fail("aligned again"))
        first = task.measure("model")
        assert len(task._untouched) == (4 if is_shared else 0)  # those of the second model
        second = task.measure("against")
    assert not task._untouched
    assert not task._forms
    for case, form in second.attacked.items():
        assert (form.num_untouched > 0).all()
        assert not is_shared or np.array_equal(form.num_untouched, first.attacked[case].num_untouched)


@pytest.mark.thorough
def test_an_interrupted_run_resumes(trained, data_file, tmp_path, monkeypatch):
    settings = make_settings(trained, data_file, tmp_path)
    calls = []

    def stop_at(number):
        def score(*arguments, **options):
            calls.append(options["progress"])
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return score

    original = measure.score_tokens
    monkeypatch.setattr(measure, "score_tokens", stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(settings)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.setattr(measure, "score_tokens", stop_at(0))
    resumed = evaluate_robustness(settings)
    assert len(calls) == 3 + 3  # clean and four cells, two of which were finished
    evaluate_robustness(settings)
    assert len(calls) == 6
    monkeypatch.undo()
    anew = evaluate_robustness(make_settings(trained, data_file, tmp_path / "anew"))
    assert resumed["models"] == anew["models"]


@pytest.mark.thorough
def test_what_decides_the_numbers_is_measured_again(untrained, tokenizer, data_file, tmp_path, monkeypatch):
    folder = shutil.copytree(untrained, tmp_path / "model")
    calls = []
    original = measure.score_tokens
    monkeypatch.setattr(
        measure, "score_tokens", lambda *a, **options: calls.append(options["progress"]) or original(*a, **options)
    )

    def measured(**changes):
        calls.clear()
        settings = {"severities": (2,), "seeds": (0,)} | changes
        result = evaluate_robustness(make_settings(str(folder), data_file, tmp_path / "out", **settings))
        return len(calls), result["models"]["model"]["clean"]["perplexity"]["estimate"]

    assert measured()[0] == 2
    assert measured()[0] == 0
    assert measured(severities=(2, 3), seeds=(0, 1))[0] == 3
    assert measured(block_size=20)[0] == 2
    assert measured(dtype="bfloat16")[0] == 2
    assert measured(documents=12)[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr("symphony_hf.evaluation.robustness.task.versions", lambda: {"torch": "another"})
        assert measured()[0] == 2
    before = measured()[1]
    save(folder, make_model("olmoe", seed=1, vocab_size=len(tokenizer), max_position_embeddings=128), tokenizer)
    number, after = measured()
    assert number == 2
    assert after != before


@pytest.mark.thorough
def test_a_damaged_entry_is_measured_again_with_a_warning(trained, data_file, tmp_path):
    settings = make_settings(trained, data_file, tmp_path, severities=(2,), seeds=(0,))
    first = evaluate_robustness(settings)
    (entry,) = (tmp_path / "cells").glob("aaa-*.npz")
    entry.write_bytes(entry.read_bytes()[:100])
    with pytest.warns(SymphonyWarning, match=r"aaa-2-seed0-.*npz: damaged, so it is measured again"):
        again = evaluate_robustness(settings)
    assert again["models"] == first["models"]


@pytest.mark.thorough
def test_a_symphonized_checkpoint_is_measured_with_its_graphs(trained, tokenizer, data_file, tmp_path):
    model = move_graphs(symphonize(AutoModelForCausalLM.from_pretrained(trained)))
    path = save(tmp_path / "symphony", model, tokenizer)
    settings = make_settings(path, data_file, tmp_path / "out", against=trained, severities=(2,), seeds=(0,))
    result = evaluate_robustness(settings)
    assert result["comparisons"]["clean"]["estimate"] != 1.0


@pytest.mark.thorough
def test_models_with_other_tokens_are_compared_by_words(trained, word_tokenizer, data_file, tmp_path):
    model = make_model("olmoe", vocab_size=len(word_tokenizer), max_position_embeddings=128)
    path = save(tmp_path / "words", model, word_tokenizer)
    result = evaluate_robustness(make_settings(trained, data_file, tmp_path / "out", against=path, severities=(2,)))
    comparisons = result["comparisons"]
    assert comparisons["unit"] == "word"
    assert comparisons["attacks"][0]["untouched"] is None
    per_word = [model["clean"]["per_word"] for model in result["models"].values()]
    assert comparisons["clean"]["estimate"] == pytest.approx(per_word[0] / per_word[1])


@pytest.mark.thorough
def test_models_with_other_vocabularies_of_words_are_compared_by_words(documents, word_tokenizer, data_file, tmp_path):
    """They have as many tokens, and other words are unknown."""
    paths = []
    for share in (1, 2):
        words = list(word_tokenizer.get_vocab())[::share]
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<eos>", *words]))}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
        model = make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=128)
        paths.append(save(tmp_path / str(share), model, tokenizer))
    settings = make_settings(paths[0], data_file, tmp_path / "out", against=paths[1], severities=(2,), seeds=(0,))
    with pytest.warns(SymphonyWarning, match="easier to predict than the words that the other model has to spell"):
        comparisons = evaluate_robustness(settings)["comparisons"]
    assert comparisons["unit"] == "word"
    assert comparisons["attacks"][0]["untouched"] is None


def test_stored_measurements_are_of_the_same_unknown_words(word_tokenizer):
    """Their ids are the same, and which tokens are untouched is not."""
    digests = {measure._tokenize([Document("a", f"the {word} old")], word_tokenizer).digest for word in ("qw", "er")}
    assert len(digests) == 2


@pytest.mark.thorough
def test_the_command_prints_levels_and_verdicts(trained, untrained, data_file, compared, real_pictures, tmp_path):
    output = shutil.copytree(compared[1], tmp_path / "out")
    command = ["eval", trained, "--against", untrained, "--data", str(data_file), "--severity", "2,5", "--seeds", "0,1"]
    options = ["--block_size", "24", "--output", str(output)]
    result = CliRunner().invoke(app, command + options, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0
    page = " ".join(result.output.split())
    estimate = compared[0]["comparisons"]["clean"]["estimate"]
    against = Path(untrained).name
    assert f"is better than {against} (ratio of perplexities per token {estimate:.4f}" in page
    assert f"Against clean text it loses more than {against}." in page
    assert "there are 10." in page
    assert "14 documents" in page
    assert (output / "robustness.png").stat().st_size > 10_000


def test_two_revisions_of_a_model_have_two_names(compared):
    settings = compared[0]["settings"] | {"model": "org/model", "against": "org/model", "revision": "v2"}
    page = StringIO()
    print_robustness({**compared[0], "settings": settings}, Console(width=200, file=page))
    assert "org/model (model) is better than org/model (against)" in page.getvalue()


def test_names_are_printed_letter_by_letter(compared):
    result = {**compared[0], "notes": ["from runs/[lr1]"]}
    result["settings"] = result["settings"] | {"model": "runs/[lr1]/final", "against": "runs/[/x]/final"}
    page = StringIO()
    print_robustness(result, Console(width=200, file=page))
    for name in ("runs/[lr1]/final", "from runs/[lr1]", "than runs/[/x]/final"):
        assert name in page.getvalue()


def test_each_verdict_of_the_result_is_counted(compared):
    result = json.loads(json.dumps(compared[0]))
    assert verdicts(result)[-1].endswith("there are 10.")  # clean, and three of each of three rows
    for row in result["comparisons"]["attacks"]:
        row["untouched"] = None
    assert verdicts(result)[-1].endswith("there are 7.")


def test_a_comparison_says_its_unit_and_that_levels_have_another(compared):
    result = json.loads(json.dumps(compared[0]))
    assert " (ratio of perplexities per token 0." in verdicts(result)[0]
    assert not any("do not compare" in sentence for sentence in verdicts(result))
    result["comparisons"]["unit"] = "word"
    assert " (ratio of perplexities per word 0." in verdicts(result)[0]
    assert "The models' tokens differ, so their perplexities per token do not compare" in verdicts(result)[-2]


def test_an_earlier_result_does_not_outlive_a_new_evaluation_in_its_folder(
    compared, untrained, data_file, tmp_path, monkeypatch
):
    output = shutil.copytree(compared[1], tmp_path / "out")
    (output / "robustness.png").write_bytes(b"")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "score_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(make_settings(untrained, data_file, output, block_size=20))
    assert [path.name for path in output.iterdir()] == ["cells"]
    for other in ({"mine": True}, {"layers": {}, "routers": [], "versions": versions()}):  # the second of `routing`
        (output / "result.json").write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=r"has `result\.json`, which no run of symphony_hf wrote"):
            evaluate_robustness(make_settings(untrained, data_file, output))


def test_one_model_alone_has_no_verdict(trained, data_file, tmp_path):
    result = evaluate_robustness(make_settings(trained, data_file, tmp_path, severities=(2,), seeds=(0,)))
    assert "comparisons" not in result
    page = StringIO()
    print_robustness(result, Console(width=200, file=page))
    assert "aaa" in page.getvalue()
    assert "verdict" not in page.getvalue()


def test_help_shows_an_example():
    page = CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "200"}).output
    assert "symphony eval runs/symphony/final --against runs/plain/final" in page


def test_settings_that_make_no_sense_are_refused_before_anything_is_read():
    for changes, message in [
        ({"attacks": ("aa",)}, "did you mean `aaa`"),
        ({"severities": (0,)}, "severity must be"),
        ({"seeds": ()}, "`seeds` must be one or more"),
        ({"attacks": ("aaa", "aaa")}, "each once"),
        ({"documents": 0}, "`documents` must be at least 1"),
        ({"block_size": 1}, "`block_size` must be at least 2"),
        ({"split": "testing"}, "`split` must be"),
        ({"task": "txt"}, "no task is named 'txt'; did you mean `text`"),
        ({"attacks": ("fog",)}, "fog is an attack on images, and --task text attacks text: .* or --task vqa"),
        ({"attacks": ("all-images",)}, "all-images is an attack on images"),
        ({"name": "qnli"}, "`name` is of --task classification, not of text"),
        ({"images": "folder"}, "`images` is of --task vqa, not of text"),
        ({"dtype": "int8"}, "`dtype` must be one of auto"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RobustnessSettings(model="nowhere", **changes)


def test_settings_without_effect_are_refused(tmp_path):
    text = tmp_path / "notes.text"
    text.write_text("the old harbour")
    folder = str(tmp_path)
    for changes, message in [
        ({"against_revision": "v2"}, "`against_revision` has no effect, because there is no second model"),
        ({"against": folder, "against_revision": "v2"}, "`against_revision` .* is a local folder: leave it out"),
        ({"model": folder, "revision": "v2"}, "`revision` has no effect, because .* is a local folder"),
        ({"text_column": "body"}, "`text_column` has no effect, because without --data"),
        ({"text_column": "body", "data": str(text)}, r"`text_column` .*notes\.text` is a text file"),
        ({"task": "vqa", "images": folder}, "`images` has no effect, because the handwritten digits"),
        ({"task": "vqa", "answers": "choose", "max_new_tokens": 4}, "`max_new_tokens` .* no answers are generated"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RobustnessSettings(**{"model": "org/model"} | changes)
    for settings in ({"revision": "v2"}, {"text_column": "body"}):
        with pytest.raises(ConfigError, match="has no effect"):
            RoutingSettings(model=folder, **settings)
    RobustnessSettings(model="org/model", revision="v2", against="org/model", against_revision="v3", data="org/texts")
    table = tmp_path / "table.jsonl"
    table.write_text("{}")
    RoutingSettings(model="org/model", data=str(table), text_column="body")


def test_missing_inputs_are_named(trained, data_file, tmp_path, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="no config of a model"):
        evaluate_robustness(make_settings(str(tmp_path), data_file, tmp_path / "out"))
    bare = shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match=r"no tokenizer .* --tokenizer"):
        evaluate_robustness(make_settings(str(bare), data_file, tmp_path / "out"))
    short = tmp_path / "short.txt"
    short.write_text("one line of very few words\n")
    with pytest.raises(DataError, match=r"1 documents of 5 words or more .* intervals need 10"):
        evaluate_robustness(make_settings(trained, short, tmp_path / "out"))
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": "1 2 3 4 5 6"}\n' * 12)
    with pytest.raises(DataError, match="keyboard at severity 2 changes nothing in 12 documents"):
        evaluate_robustness(make_settings(trained, numbers, tmp_path / "out", attacks=("keyboard",)))
    monkeypatch.setattr("sys.argv", ["symphony", "eval", trained, "--severity", "one", "-h"][:-1])
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # so that the allocator of these tests stays as it is
    with pytest.raises(SystemExit):
        main()
    assert "--severity takes numbers with commas between them, got 'one'" in capsys.readouterr().err


def test_attacked_windows_that_are_too_long_are_refused_before_the_earlier_result_goes(
    untrained, data_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "score_tokens", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "result.json").write_text(json.dumps({"models": {}, "versions": versions()}))
    settings = make_settings(untrained, data_file, tmp_path, block_size=128, attacks=("homoglyph",))
    block_size, refusals = 128, 0
    while block_size:
        try:
            measure.TextTask(dataclasses.replace(settings, block_size=block_size), Store(tmp_path / "cells"))
            break
        except ConfigError as error:
            refused = re.match(
                r"eval: homoglyph-5-seed\d: a window has (\d+) tokens, .* takes 128: .* (\d+) or", str(error)
            )
            assert int(refused[2]) == block_size * 128 // int(refused[1])
            block_size, refusals = int(refused[2]), refusals + 1
    # Shorter windows begin at other words, so a few of them grow a little more than the longest one.
    assert 1 <= refusals <= 3
    with pytest.raises(ConfigError, match=r"^eval: homoglyph-5-seed\d: a window has \d+ tokens"):
        evaluate_robustness(settings)
    assert (tmp_path / "result.json").exists()


def test_an_interrupted_check_of_windows_goes_on_with_the_next_form(trained, data_file, tmp_path, monkeypatch):
    """Aligning all forms may take longer than scoring them."""
    original, calls = measure.find_untouched, []

    def stop_at(number):
        def find(*forms):
            calls.append(forms)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*forms)

        return find

    settings = make_settings(trained, data_file, tmp_path)
    monkeypatch.setattr(measure, "find_untouched", stop_at(2 * 14 + 3))  # in the third of four forms of 14 documents
    with pytest.raises(KeyboardInterrupt):
        measure.TextTask(settings, Store(tmp_path / "cells"))
    calls.clear()
    monkeypatch.setattr(measure, "find_untouched", stop_at(0))
    measure.TextTask(settings, Store(tmp_path / "cells"))
    assert len(calls) == 2 * 14


def test_forms_that_fit_into_one_window_each_are_not_aligned_to_check_them(trained, documents, tmp_path, monkeypatch):
    data = tmp_path / "lines.jsonl"
    lines = [line for document in documents for line in document.text.splitlines()]
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if line.count(".") == 1))
    monkeypatch.setattr(measure, "find_untouched", lambda *forms: pytest.fail("aligned"))
    measure.TextTask(make_settings(trained, data, tmp_path), Store(tmp_path / "cells"))


@pytest.mark.parametrize(("function", "expected"), [("find_untouched", 4 * 14), ("_tokenize", 1 + 4)])
def test_a_form_is_tokenized_and_aligned_once_for_its_check_and_its_scores(
    function, expected, trained, data_file, tmp_path, monkeypatch
):
    original, calls = getattr(measure, function), []
    monkeypatch.setattr(measure, function, lambda *arguments: calls.append(arguments) or original(*arguments))
    evaluate_robustness(make_settings(trained, data_file, tmp_path))
    assert len(calls) == expected  # of 4 attacked forms with 14 documents each, and a clean one


def test_windows_that_were_scored_before_are_not_cut_again(trained, data_file, tmp_path, monkeypatch):
    settings = make_settings(trained, data_file, tmp_path, severities=(2,), seeds=(0,))
    evaluate_robustness(settings)
    monkeypatch.setattr(measure, "find_untouched", lambda *forms: pytest.fail("aligned again"))
    evaluate_robustness(settings)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(trained, documents, data_file, tmp_path):
    train_tokenizer(documents, 400).save_pretrained(tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer")
    with pytest.raises(
        ConfigError, match=r"gives token id 3\d\d, and the model's vocabulary has 300 tokens: .*--tokenizer"
    ):
        evaluate_robustness(make_settings(trained, data_file, tmp_path / "out", tokenizer=path))
    with pytest.raises(ConfigError, match=r"gives token id 3\d\d, and the model's vocabulary has 300 tokens"):
        observe_routing(RoutingSettings(model=trained, data=str(data_file), tokenizer=path, output=str(tmp_path / "r")))


def test_a_model_without_finite_logits_is_refused(untrained, tokenizer, data_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(untrained)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    path = save(tmp_path / "broken", model, tokenizer)
    with pytest.raises(EvaluationError, match="not finite"):
        evaluate_robustness(make_settings(path, data_file, tmp_path / "out"))
    # No measurement is kept; the lengths of windows, which are, are none of the model.
    assert {path.name.partition("-")[0] for path in Path(tmp_path / "out").rglob("*.npz")} == {"windows"}


def test_entries_are_written_atomically(tmp_path, monkeypatch):
    store, identity = Store(tmp_path / "cells"), {"model": "one"}

    def fill_the_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            store.save("clean", identity, {"nll": np.ones(3)})
    assert list((tmp_path / "cells").iterdir()) == []
    store.save("clean", identity, {"nll": np.ones(3)})
    assert [path.suffix for path in (tmp_path / "cells").iterdir()] == [".npz"]
    assert store.load("clean", identity)["nll"].tolist() == [1, 1, 1]
