"""What the card says, and what becomes of a README that is there already."""

import json
import shutil

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from models import assert_folded, llava_inputs, make_ids, make_llava, make_model, move_graphs
from pushed import card_of, make_run
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
)

from symphony_hf import PushError, expert_graphs, load_adapter, lora_config, push, symphonize, upcycle_modules
from symphony_hf.checkpoints.auto_classes import auto_class_of
from symphony_hf.checkpoints.hub_names import origin_record
from symphony_hf.checkpoints.model_card import EFFECT
from symphony_hf.checkpoints.upload import write_card
from symphony_hf.diagnostics.plots.heat_maps import plot_graphs

pytestmark = [
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's, about its LFS upload
]


def code_of(card):
    return card.text.split("```python\n")[1].split("```")[0]


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
    assert EFFECT in card.text
    assert "## Results" not in card.text


@pytest.mark.thorough
def test_the_picture_is_of_the_graphs(hub, model, checkpoint, tmp_path, real_pictures):
    push(checkpoint, "me/it")
    drawn = plot_graphs(expert_graphs(model), tmp_path / "graphs.png").read_bytes()
    assert hub.files("me/it")["graphs.png"] == drawn
    assert plot_graphs(expert_graphs(move_graphs(model, seed=1)), tmp_path / "graphs.png").read_bytes() != drawn


@pytest.mark.parametrize("folded", [False, True])
def test_the_code_of_the_card_loads_the_model(folded, hub, model, checkpoint):
    push(checkpoint, "me/it", folded=folded)
    code = code_of(card_of(hub))
    assert ("symphony_hf" in code) != folded
    names = {}
    exec(code, names)
    ids = make_ids()
    if folded:
        assert_folded(names["model"](ids).logits, model(ids).logits)
    else:
        assert torch.equal(names["model"](ids).logits, model(ids).logits)


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


def test_a_checkpoint_without_graphs_does_not_say_that_it_had_any(hub, tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    push(tmp_path, "me/it")
    text = card_of(hub).text
    assert "without graphs of its own" in text
    assert "Where it was trained with graphs" in text
    assert "import symphony_hf" not in text
    assert EFFECT not in text


def test_a_graph_without_an_effect_is_said_to_have_none(hub, tmp_path):
    move_graphs(symphonize(make_model("mixtral"), strength=0)).save_pretrained(tmp_path)
    push(tmp_path, "me/it")
    assert EFFECT not in card_of(hub).text
    assert "routing ignores the graph" in card_of(hub).text


def test_upcycled_experts_need_this_package_folded_or_not(hub, tmp_path):
    model = move_graphs(symphonize(upcycle_modules(make_llava(), "*multi_modal_projector")))
    model.save_pretrained(tmp_path / "model")
    for folded in (False, True):
        push(tmp_path / "model", "me/it", folded=folded)
        card = card_of(hub)
        assert card.data.library_name == "symphony_hf"
        assert "has no place for its experts" in card.text
        names = {}
        exec(code_of(card), names)
        inputs = llava_inputs()
        assert_folded(names["model"](**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("model_class", "loader"),
    [
        (Qwen3MoeForSequenceClassification, "AutoModelForSequenceClassification"),
        (Qwen3MoeForTokenClassification, "AutoModelForTokenClassification"),
        (Qwen3MoeModel, "AutoModel"),
        (Qwen3MoePreTrainedModel, "Qwen3MoePreTrainedModel"),
    ],
)
def test_a_model_with_another_head_is_loaded_with_it(model_class, loader, model, checkpoint):
    """The family's language model would have a head of random weights."""
    config = json.loads((checkpoint / "config.json").read_text())
    names = {"model_type": "qwen3_moe", "architectures": [f"Symphony{model_class.__name__}"]}
    config["symphony_hf"]["replaced"]["model_type"] = "qwen3_moe"
    (checkpoint / "config.json").write_text(json.dumps({**config, **names, "model_type": "symphony_hf"}))
    code = code_of(ModelCard(write_card(checkpoint, "it").read_text()))
    assert f"from transformers import {loader}\n" in code
    assert f"model = {loader}.from_pretrained(" in code


@pytest.mark.parametrize(
    ("class_name", "model_type", "task_type", "loader"),
    [
        (None, "mixtral", None, "AutoModelForCausalLM"),
        (None, "switch_transformers", "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        (None, "mixtral", "SEQ_CLS", "AutoModelForSequenceClassification"),
        (None, "llava", "CAUSAL_LM", "AutoModelForImageTextToText"),
        (None, None, None, "AutoModelForCausalLM"),
        ("SwitchTransformersForConditionalGeneration", None, None, "AutoModelForSeq2SeqLM"),
        ("WikiTextMoeForCausalLM", "wikitext_moe", None, "AutoModelForCausalLM"),
        ("WikiTextMoeModel", "wikitext_moe", None, "AutoModel"),
        ("Qwen3MoePreTrainedModel", "qwen3_moe", None, "Qwen3MoePreTrainedModel"),
        ("MixtralOfTheUsers", "mixtral", None, "AutoModelForCausalLM"),  # nobody else could import it
    ],
)
def test_the_class_decides_before_the_model_type(class_name, model_type, task_type, loader):
    assert auto_class_of(class_name, model_type, task_type) == loader


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


def test_a_readme_of_metadata_alone_gets_the_cards_text(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    push(checkpoint, "me/it")
    card = card_of(hub)
    assert card.data.license == "mit"
    assert "graphs.png" in card.text


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


def test_text_on_the_hub_stays_when_a_run_folder_with_its_own_card_is_pushed_again(hub, checkpoint):
    write_card(checkpoint, "it")
    push(checkpoint, "me/it")
    stored = hub.repos["me/it"].commit_of("main")[1]["README.md"]
    stored.content = (
        stored.content.replace(b"library_name:", b"license: gpl\nlanguage: en\nlibrary_name:") + b"\nMy end.\n"
    )
    local = checkpoint / "README.md"
    local.write_text(local.read_text().replace("library_name:", "license: mit\nlibrary_name:"))
    push(checkpoint, "me/it")
    card = card_of(hub)
    assert card.text.endswith("<!-- end of the symphony card -->\n\nMy end.\n")
    assert "# it\n" in card.text
    assert card.data.license == "mit"  # the folder's own metadata goes first
    assert card.data.language == "en"


@pytest.mark.parametrize("metadata", ["- a\n- list", "a: [", "model-index: 3"])
def test_a_readme_whose_metadata_cannot_be_read(metadata, hub, checkpoint):
    (checkpoint / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(PushError, match=r"README\.md`: its metadata cannot be read"):
        push(checkpoint, "me/it")


@pytest.mark.parametrize("licence", [None, "llama3"])
def test_the_licence_follows_the_base_model(licence, hub, model, checkpoint, tmp_path):
    push(make_run(tmp_path, model), "them/other", license=licence)
    push(checkpoint, "me/it", base_model="them/base", license="other")
    stored = hub.repos["me/it"].commit_of("main")[1]["README.md"]
    stored.content = stored.content.replace(b"library_name:", b"license_name: base-only\nlibrary_name:")
    push(checkpoint, "me/it", base_model="them/base")  # the same again: what was written about it still holds
    assert (card_of(hub).data.license, card_of(hub).data.license_name) == ("other", "base-only")
    push(checkpoint, "me/it", base_model="them/other")
    card = card_of(hub)
    assert card.data.base_model == "them/other"
    assert card.data.license == licence
    assert "license_name" not in card.data.to_dict()
    assert "| base model | [them/other]" in card.text
    assert f"| licence | {'`llama3`' if licence else 'not known'}" in card.text


def test_a_licence_that_stood_alone_is_kept(hub, checkpoint):
    """A repository that was created with a licence has a README of that alone."""
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    push(checkpoint, "me/it", base_model="them/base")
    assert (card_of(hub).data.license, card_of(hub).data.base_model) == ("mit", "them/base")


def test_an_earlier_push_of_another_kind_leaves_no_relation(hub, checkpoint, tmp_path):
    adapted = peft.get_peft_model(symphonize(make_model()), lora_config(symphonize(make_model())))
    adapted.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/it", base_model="them/base")
    assert card_of(hub).data.base_model_relation == "adapter"
    push(checkpoint, "me/it", base_model="them/base")
    assert card_of(hub).data.base_model_relation == "finetune"


def test_several_base_models_that_were_written_stay_and_are_shown(hub, checkpoint):
    push(checkpoint, "me/it")
    stored = hub.repos["me/it"].commit_of("main")[1]["README.md"]
    stored.content = stored.content.replace(b"library_name:", b"base_model: [them/a, them/b]\nlibrary_name:")
    push(checkpoint, "me/it")
    assert card_of(hub).data.base_model == ["them/a", "them/b"]
    assert "[them/a](https://huggingface.co/them/a), [them/b](https://huggingface.co/them/b) |" in card_of(hub).text


# Adapters.


@pytest.mark.parametrize("graphs", [True, False])
def test_an_adapter(graphs, hub, tmp_path):
    def base():
        return symphonize(make_model("olmoe"))

    config = peft.LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["symphony"] if graphs else None,
        inference_mode=not graphs,  # a new adapter that is to be trained holds the graphs unasked
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
    assert ("symphony_hf.load_adapter" in code_of(card)) == graphs
    assert ("graphs.png" in hub.files("me/it")) == graphs
    assert ("symphony-smoe" in card.data.tags) == graphs
    assert ("with [Symphony routing]" in card.text) == graphs
    ids = make_ids()
    again = peft.PeftModel.from_pretrained(base(), "me/it").eval()
    assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_an_adapter_with_its_record_is_loaded_as_its_card_says(hub, tmp_path):
    adapted = peft.get_peft_model(move_graphs(symphonize(make_model())), lora_config(symphonize(make_model()))).eval()
    move_graphs(adapted, seed=1)
    adapted.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "me/it", base_model="them/base")
    code = code_of(card_of(hub))
    assert code.splitlines()[-2:] == [
        'model = AutoModelForCausalLM.from_pretrained("them/base")',
        'model = symphony_hf.load_adapter(model, "me/it")',
    ]
    ids = make_ids()
    assert torch.equal(load_adapter(make_model(), "me/it")(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("has_record", [True, False])
def test_an_adapter_of_a_vision_language_model(has_record, hub, tmp_path):
    make_llava().save_pretrained(tmp_path / "base")
    push(tmp_path / "base", "them/base")
    model = symphonize(make_llava())
    adapted = move_graphs(peft.get_peft_model(model, lora_config(model)), seed=1).eval()
    inputs = llava_inputs()
    adapted.save_pretrained(tmp_path / "adapter")
    if not has_record:  # as PEFT alone would have saved it
        (tmp_path / "adapter" / "symphony_config.json").unlink()
        file = tmp_path / "adapter" / "adapter_config.json"
        values = json.loads(file.read_text())
        del values["symphony"]
        file.write_text(json.dumps(values))
    push(tmp_path / "adapter", "me/it", base_model="them/base")
    card = card_of(hub)
    assert card.data.pipeline_tag == "image-text-to-text"
    names = {}
    exec(code_of(card), names)
    loaded = names["model"].eval()
    assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)
    generated, expected = (m.generate(**inputs, max_new_tokens=2, do_sample=False) for m in (loaded, adapted))
    assert torch.equal(generated, expected)


def test_a_vision_language_model(hub, tmp_path):
    model, inputs = move_graphs(symphonize(make_llava())), llava_inputs()
    model.save_pretrained(tmp_path)
    push(tmp_path, "me/it", folded=True)
    card = card_of(hub)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText" in code_of(card)
    plain = AutoModelForImageTextToText.from_pretrained("me/it")
    assert_folded(plain(**inputs).logits, model(**inputs).logits)


def test_an_untrained_auto_class_is_not_needed_for_a_base_name(hub, model):
    """What a model was loaded from is its base, where that is a name on the Hub."""
    model.push_to_hub("me/first")
    loaded = AutoModelForCausalLM.from_pretrained("me/first")
    loaded.push_to_hub("me/second")
    assert card_of(hub, "me/second").data.base_model == "me/first"
    assert card_of(hub, "me/first").data.base_model is None


def test_a_model_that_is_pushed_again_is_not_its_own_base(hub, model):
    model.push_to_hub("me/it", base_model="them/base")
    loaded = AutoModelForCausalLM.from_pretrained("me/it")
    for base_model in (None, "them/other"):
        loaded.push_to_hub("me/it", base_model=base_model)
        assert card_of(hub).data.base_model == (base_model or "them/base")
    assert "me/it" not in card_of(hub).text.split("## What it was made from")[1].split("##")[0]


@pytest.mark.parametrize("is_run", [True, False])
def test_what_is_inferred_does_not_replace_what_was_written(is_run, hub, model, tmp_path):
    """From a run's results, and from what a model was loaded from."""
    model.push_to_hub("me/it", base_model="them/written", license="mit")
    if is_run:
        push(make_run(tmp_path, model, model={"path": "them/inferred"}), "me/it")
    else:
        model.push_to_hub("me/first")
        AutoModelForCausalLM.from_pretrained("me/first").push_to_hub("me/it")
    assert card_of(hub).data.base_model == "them/written"
    assert "| base model | [them/written]" in card_of(hub).text  # as the metadata says
    assert "| licence | `mit` |" in card_of(hub).text


def test_a_path_of_the_machine_that_trained_is_no_name_on_the_hub(hub, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrained").mkdir(parents=True)
    (tmp_path / "runs" / "words").mkdir()
    run = make_run(tmp_path, model, model={"path": "runs/pretrained"}, data={"path": "runs/words"})
    values = json.loads((run / "results.json").read_text())
    values["origin"] = origin_record("runs/pretrained", "runs/words")
    (run / "results.json").write_text(json.dumps(values))
    shutil.rmtree(tmp_path / "runs")
    push(run, "me/it")
    card = card_of(hub)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "| data | words |" in card.text
    values["origin"] = origin_record("them/base", "them/words:en")
    (run / "results.json").write_text(json.dumps(values))
    push(run, "me/other")
    assert card_of(hub, "me/other").data.base_model == "them/base"
