"""What the card says, and what becomes of a README that is there already."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from models import make_ids, make_model
from transformers import AutoModelForCausalLM

from symphony_hf import PushError, export_folded, push, symphonize

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's, about its LFS upload
]
REPORT = Path(__file__).parents[2] / "recipes" / "quickstart" / "report.json"


def card_of(hub, repo_id="me/it", revision="main"):
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def code_of(card):
    return card.text.split("```python\n")[1].split("```")[0]


def make_run(tmp_path, trained, /, **recipe):
    """What the runner leaves."""
    run = tmp_path / "run"
    trained.save_pretrained(run / "final")
    torch.save({"learning_rate": 1}, run / "final" / "training_args.bin")
    results = {
        "recipe": {"model": {"path": None}, "data": {"path": None}, **recipe},
        "test": {"clean": 10.0, "attacked": 25.0, "ratio": 2.5, "documents": 7, "tokens": 99},
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "checkpoint-3").mkdir(exist_ok=True)
    return run


def test_what_is_known_is_said_and_what_is_not_known_too(hub, checkpoint):
    push(checkpoint, "me/it")
    card = card_of(hub)
    assert card.data.tags == ["symphony-smoe", "moe", "arxiv:2510.16411"]
    assert card.data.library_name == "symphony_hf"  # the Hub would else show how to load it without its graphs
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license is None
    for words in ("| licence | not known", "| base model | not known", "| data | not known", "`mixtral`"):
        assert words in card.text
    for words in ("3 layers have a graph, of 6 experts each", "| `strength` | `1.0` |", "eprint        = {2510.16411}"):
        assert words in card.text
    assert "![How often two experts of a layer are chosen together](graphs.png)" in card.text
    assert "## Results" not in card.text


def test_the_picture_is_of_the_graphs(hub, checkpoint, real_picture):
    push(checkpoint, "me/it")
    assert hub.files("me/it")["graphs.png"].startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("folded", [False, True])
def test_the_code_of_the_card_loads_the_model(folded, hub, model, checkpoint):
    push(checkpoint, "me/it", folded=folded)
    code = code_of(card_of(hub))
    assert ("symphony_hf" in code) != folded
    names = {}
    exec(code, names)
    ids = make_ids()
    assert torch.equal(names["model"](ids).logits, model(ids).logits)


def test_a_run_is_pushed_with_its_results_and_without_its_state(hub, model, tmp_path, caplog):
    run = make_run(tmp_path, model, model={"path": "them/base"}, data={"path": "them/words"})
    push(run, "me/it")
    assert not {"training_args.bin", "results.json"} & set(hub.files("me/it"))
    assert "left out: training_args.bin (a pickle of Trainer's state)" in caplog.text
    card = card_of(hub)
    assert card.data.base_model == "them/base"
    assert card.data.datasets == ["them/words"]
    by_name = {result.metric_name: result for result in card.data.eval_results}
    assert by_name["perplexity, clean"].metric_value == 10.0
    assert by_name["perplexity, attacked"].metric_value == 25.0
    assert by_name["perplexity, attacked"].dataset_type == "them/words"
    for row in ("| perplexity, clean | 10.00 |", "| attacked / clean | 2.5000 |"):
        assert row in card.text
    assert "On 7 held-out documents" in card.text


def test_the_licence_is_the_base_models(hub, model, tmp_path):
    push(make_run(tmp_path, model), "them/base", license="apache-2.0")
    run = make_run(tmp_path, model, model={"path": "them/base"})
    push(run, "me/it")
    assert card_of(hub).data.license == "apache-2.0"
    assert "| licence | `apache-2.0` |" in card_of(hub).text
    push(run, "me/other", license="mit")
    assert card_of(hub, "me/other").data.license == "mit"


def test_the_folders_of_the_machine_are_not_said(hub, model, tmp_path):
    data = tmp_path / "secret project" / "words"
    data.mkdir(parents=True)
    push(make_run(tmp_path, model, model={"path": str(tmp_path)}, data={"path": str(data)}), "me/it")
    readme = hub.files("me/it")["README.md"].decode()
    assert str(tmp_path) not in readme
    assert "secret" not in readme
    assert "| data | words |" in readme


def test_the_quickstarts_report_gives_intervals(hub, model, tmp_path):
    for name in ("symphony", "plain"):
        model.save_pretrained(tmp_path / name)
    export_folded(model, tmp_path / "folded")
    shutil.copy(REPORT, tmp_path / "report.json")
    arms = json.loads(REPORT.read_text())["arms"]
    for directory, arm in ((tmp_path, "symphony"), (tmp_path / "folded", "symphony"), (tmp_path / "plain", "plain")):
        push(directory, f"me/{directory.name}")
        card = card_of(hub, f"me/{directory.name}")
        attacked = arms[arm]["attacked"]
        result = next(result for result in card.data.eval_results if "attacked" in result.metric_name)
        assert result.metric_value == attacked["estimate"]
        assert result.metric_name == f"perplexity, attacked [95%: {attacked['low']:.2f} to {attacked['high']:.2f}]"
        row = f"{attacked['estimate']:.2f} [{attacked['low']:.2f}, {attacked['high']:.2f}]"
        assert f"| perplexity, attacked [95%] | {row} |" in card.text


NO_PERPLEXITY = {"recipe": {"data": {"path": "x"}, "model": {"path": None}}, "test": {"clean": 0, "attacked": 1}}


@pytest.mark.parametrize(
    "results",
    ["[", "[]", "{}", '{"arms": {}}', '{"test": 3}', '{"test": {}, "recipe": {}}', json.dumps(NO_PERPLEXITY)],
)
def test_results_that_are_none(results, hub, checkpoint):
    (checkpoint / "results.json").write_text(results)
    with pytest.raises(PushError, match=r"results\.json"):
        push(checkpoint, "me/it")
    assert hub.requests == []


# A README that is there.


def test_a_readme_of_the_user_keeps_its_words(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\nmood: good\n---\n\n# Mine\n\nMy words.\n")
    push(checkpoint, "me/it")
    card = card_of(hub)
    assert card.text == "\n# Mine\n\nMy words.\n"
    assert card.data.license == "mit"
    assert card.data.mood == "good"
    assert card.data.tags == ["mine", "symphony-smoe", "moe", "arxiv:2510.16411"]
    assert card.data.library_name == "symphony_hf"
    push(checkpoint, "me/it", license="apache-2.0")
    assert card_of(hub).data.license == "apache-2.0"  # what is said now goes before what was written


def test_a_readme_without_metadata_gets_it(hub, checkpoint):
    (checkpoint / "README.md").write_text("# Mine\n")
    push(checkpoint, "me/it")
    assert card_of(hub).text == "# Mine\n"
    assert card_of(hub).data.tags[0] == "symphony-smoe"


def test_what_was_written_on_the_hub_stays_and_our_part_is_written_anew(hub, checkpoint, model, caplog):
    push(checkpoint, "me/it")
    stored = hub.repos["me/it"].commit_of("main")[1]["README.md"]
    edited = (
        stored.content.replace(b"<!-- symphony card -->", b"My preface.\n\n<!-- symphony card -->") + b"\nMy end.\n"
    )
    stored.content = edited.replace(b"library_name:", b"language: en\nlibrary_name:")
    model.config.symphony["strength"] = 0.25
    model.save_pretrained(checkpoint)
    push(checkpoint, "me/it")
    card = card_of(hub)
    assert card.text.lstrip().startswith("My preface.\n\n<!-- symphony card -->\n\n# it")
    assert card.text.endswith("<!-- end of the symphony card -->\n\nMy end.\n")
    assert "| `strength` | `0.25` |" in card.text
    assert "| `strength` | `1.0` |" not in card.text
    assert card.data.language == "en"
    (checkpoint / "README.md").write_text("# Mine\n")
    push(checkpoint, "me/it")
    assert "README.md on the Hub is replaced by the folder's; its history has it" in caplog.text


@pytest.mark.parametrize("metadata", ["- a\n- list", "a: [", "model-index: 3"])
def test_a_readme_whose_metadata_cannot_be_read(metadata, hub, checkpoint):
    (checkpoint / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(PushError, match=r"README\.md`: its metadata cannot be read"):
        push(checkpoint, "me/it")


# Adapters.


@pytest.mark.parametrize("graphs", [True, False])
def test_an_adapter(graphs, hub, tmp_path):
    def base():
        return symphonize(make_model("olmoe"))

    config = peft.LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["symphony"] if graphs else None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, tensor in adapted.named_buffers():
            if name.endswith("adjacency") and "modules_to_save" in name:
                tensor.copy_(torch.eye(8) + 1)
    adapted.save_pretrained(tmp_path / "adapter")
    stored = tmp_path / "adapter" / "adapter_config.json"
    stored.write_text(json.dumps({**json.loads(stored.read_text()), "base_model_name_or_path": "them/base"}))
    assert "[More Information Needed]" in (tmp_path / "adapter" / "README.md").read_text()
    push(tmp_path / "adapter", "me/it")
    card = card_of(hub)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "them/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.pipeline_tag == "text-generation"
    assert "[More Information Needed]" not in card.text
    assert ("symphonize(model)" in code_of(card)) == graphs
    assert ("graphs.png" in hub.files("me/it")) == graphs
    ids = make_ids()
    again = peft.PeftModel.from_pretrained(base(), "me/it").eval()
    assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_a_vision_language_model(hub, tmp_path):
    from models import llava_inputs, make_llava, move_graphs
    from transformers import AutoModelForImageTextToText

    model, inputs = move_graphs(symphonize(make_llava())), llava_inputs()
    model.save_pretrained(tmp_path)
    push(tmp_path, "me/it", folded=True)
    card = card_of(hub)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText" in code_of(card)
    plain = AutoModelForImageTextToText.from_pretrained("me/it")
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)


def test_an_untrained_auto_class_is_not_needed_for_a_base_name(hub, model):
    """What a model was loaded from is its base, where that is a name on the Hub."""
    model.push_to_hub("me/first")
    loaded = AutoModelForCausalLM.from_pretrained("me/first")
    loaded.push_to_hub("me/second")
    assert card_of(hub, "me/second").data.base_model == "me/first"
    assert card_of(hub, "me/first").data.base_model is None
