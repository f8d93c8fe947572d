"""`symphony eval --task vqa`: answers about corrupted images against the processor used by hand, and refusals."""

import importlib.util
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from models import make_model as make_text_model
from typer.testing import CliRunner
from visual import SIDE, entry, make_model, make_processor, write_llava

import symphony_hf.evaluation.robustness.vqa as visual_task
from symphony_hf.cli import app
from symphony_hf.data.documents import Document
from symphony_hf.data.images.decoding import decode
from symphony_hf.data.images.processors import Asked, make_asker
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.image import IMAGE_ATTACKS, enlarged
from symphony_hf.evaluation.generation import answer_freely, choose_answers
from symphony_hf.evaluation.robustness.evaluate import TASKS, evaluate_robustness, open_task
from symphony_hf.evaluation.robustness.settings import KINDS, RobustnessSettings
from symphony_hf.evaluation.robustness.task import Store

NUMBER = 12
DIGITS = [f"The digit is {digit}." for digit in range(10)]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer([Document("a", "Which digit is shown? The digit is 7. " * 9)], 300))


def make_settings(model, output, **changes):
    settings = {"attacks": ("contrast", "shot_noise"), "severities": (5,), "seeds": (0, 1), "documents": NUMBER}
    settings |= {"model": str(model), "output": str(output), "task": "vqa", "batch_size": 4}
    return RobustnessSettings(**(settings | changes))


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(processor, tmp_path_factory):
    return save(tmp_path_factory.mktemp("untrained"), make_model(processor), processor)


@pytest.fixture(scope="module")
def trained(processor, untrained, tmp_path_factory):
    """One that knows the very digits that it is asked, clean."""
    model = make_model(processor)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(10)  # a new projector's small weights would let little of the image through for long
    task = open_task(make_settings(untrained, tmp_path_factory.mktemp("none")), Store(None))
    asked = list(task._asked(None))
    asker = make_asker(processor, [])
    inputs = asker.answered(asked, [one.example.answer for one in asked])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, : asker.prompts(asked)["input_ids"].shape[1]] = -100  # all prompts are the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(tmp_path_factory.mktemp("trained"), model.eval(), processor)


@pytest.fixture(scope="module")
def compared(trained, untrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("eval")
    return evaluate_robustness(make_settings(trained, output, against=str(untrained))), output


def by_hand(processor, example, cell):
    """Rendered text up to the answer, and pixels of its image, clean or corrupted."""
    image = enlarged(decode(example.images[0]))
    if cell is not None:
        attack, severity, seed = cell
        image = IMAGE_ATTACKS[attack](image, severity, seed=seed, name=f"{example.name} 0")
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhich digit is shown?"}], tokenize=False, add_generation_prompt=True
    )
    return text, image


def naive_log_probs(model, processor, text, image, answers):
    """One forward an answer, no padding."""
    scores = []
    for answer in answers:
        inputs = processor(text=f"{text} {answer}<|endoftext|>", images=image, return_tensors="pt")
        with torch.no_grad():
            log_probs = model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        scores.append(sum(float(log_probs[place - 1, ids[place]]) for place in range(1, len(ids))))
    return np.array(scores)


@pytest.mark.thorough
@pytest.mark.parametrize("cell", [None, ("contrast", 5, 0), ("shot_noise", 5, 1)])
def test_chosen_answers_are_those_of_the_processor_by_hand(trained, tmp_path, processor, cell):
    task = open_task(make_settings(trained, tmp_path), Store(tmp_path))
    found = next(own for own in (None, *task.cases) if own == cell)
    chosen = task.choose("model", found)["chosen"]
    assert task.choices == sorted({example.answer for example in task.examples})
    model = task.models_under_test["model"].model
    for example, number in zip(task.examples, chosen, strict=True):
        scores = naive_log_probs(model, processor, *by_hand(processor, example, cell), task.choices)
        # float32 sums over padded rows, in another order: the chosen one is the best, or as good.
        assert scores[number] >= scores.max() - 1e-3


def test_the_length_of_answers_that_are_chosen_is_noted(untrained, tmp_path):
    task = open_task(make_settings(untrained, tmp_path, max_new_tokens=9), Store(tmp_path))
    assert any("`max_new_tokens` has no effect" in note for note in task.notes)


@pytest.mark.parametrize("answers", ["free", "choose"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(processor, tmp_path, answers):
    text = "Which digit is shown? The digit is 7. " * 9 + "The digit is 0. 1. 2. 3. 4. 5. 6. 8. 9. "
    large = make_processor(train_tokenizer([Document("a", text)], 300))
    model = make_model(processor)
    model.resize_token_embeddings(258)  # without the last merges, of which all prompts have some
    save(tmp_path / "model", model, large)
    with pytest.raises(ConfigError, match=r"gives token id 2\d\d, and the model's vocabulary has 258 tokens"):
        open_task(make_settings(tmp_path / "model", tmp_path / "out", answers=answers), Store(tmp_path / "out"))


def test_the_placeholder_of_images_needs_no_embedding(processor, tmp_path):
    """Models put the features of images in its place."""
    model = make_model(processor)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_id == len(processor.tokenizer) - 1
    model.resize_token_embeddings(image_id)
    save(tmp_path / "model", model, processor)
    open_task(make_settings(tmp_path / "model", tmp_path / "out"), Store(tmp_path / "out"))


@pytest.mark.thorough
def test_free_answers_are_those_of_generate(trained, tmp_path, processor):
    task = open_task(make_settings(trained, tmp_path, answers="free", max_new_tokens=9), Store(tmp_path))
    kept = task.choose("model", task.cases[0])
    model, end = task.models_under_test["model"].model, processor.tokenizer.eos_token_id
    for place, example in enumerate(task.examples):
        text, image = by_hand(processor, example, task.cases[0])
        inputs = processor(text=text, images=image, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=end, pad_token_id=end)
        answer = processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert kept["given"][place] == answer.strip()
        assert kept["chosen"][place] == (answer.strip() == example.answer)
    assert 0 < kept["chosen"].sum() < NUMBER


@pytest.mark.thorough
def test_a_planted_difference_is_found_and_corruption_hurts(compared):
    result, output = compared
    comparisons = result["comparisons"]
    assert comparisons["clean"]["verdict"] == "better"
    model = result["models"]["model"]
    assert model["clean"]["accuracy"]["estimate"] == 1.0
    rows = {row["attack"]: row for row in model["attacks"]}
    assert rows["contrast"]["difference"]["verdict"] == "worse"  # than clean
    assert set(rows["contrast"]["seeds"]) == {"0"}  # which leaves nothing to chance
    assert set(rows["shot_noise"]["seeds"]) == {"0", "1"}
    assert result["documents"]["unit"] == "questions"
    assert result["documents"]["number"] == NUMBER
    assert json.loads((output / "result.json").read_text()) == json.loads(json.dumps(result))


@pytest.mark.thorough
def test_an_interrupted_run_resumes_and_two_copies_are_not_distinguishable(untrained, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in untrained.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"note": "another fingerprint"}))
    settings = make_settings(untrained, tmp_path, against=str(copy), attacks=("contrast",))
    calls = []
    original = visual_task.choose_answers

    def choose(*arguments, **options):
        calls.append(options["progress"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(visual_task, "choose_answers", choose)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(settings)
    result = evaluate_robustness(settings)
    assert len(calls) == 3 + 2  # clean and one cell of each model, two of which were finished
    evaluate_robustness(settings)
    assert len(calls) == 5
    (row,) = result["comparisons"]["attacks"]
    for interval in (result["comparisons"]["clean"], row["accuracy"], row["difference"]):
        assert interval["low"] == interval["estimate"] == interval["high"] == 0
        assert interval["verdict"] == "not distinguishable"


@pytest.mark.thorough
def test_the_command_prints_accuracies_and_verdicts(trained, untrained, compared, tmp_path):
    output = shutil.copytree(compared[1], tmp_path / "out")
    command = ["eval", str(trained), "--against", str(untrained), "--task", "vqa", "--data", "digits"]
    options = ["--attack", "contrast,shot_noise", "--severity", "5", "--seeds", "0,1", "--documents", str(NUMBER)]
    result = CliRunner().invoke(
        app, [*command, *options, "--output", str(output)], env={"COLUMNS": "250"}, catch_exceptions=False
    )
    page = " ".join(result.output.split())
    assert f"{NUMBER} questions: scikit-learn's handwritten digits, test split, answered choosing among" in page
    assert (
        f"On clean images, {Path(trained).name} is better than {Path(untrained).name} (difference of accuracies" in page
    )
    assert "all 12 questions agree. A case that affects fewer than 25.0% of questions may be missing" in page
    assert "there are 5." in page


def test_llavas_own_json_is_asked(untrained, tmp_path):
    entries = [entry(number, images=0 if number == 3 else 1 + number % 2) for number in range(14)]
    path = write_llava(tmp_path, entries, leave_out=("coco/train2017/000004_0.jpg",))
    settings = make_settings(untrained, tmp_path / "out", data=str(path), attacks=("contrast",), answers="free")
    settings = RobustnessSettings(**(vars(settings) | {"documents": 14, "max_new_tokens": 2}))
    result = evaluate_robustness(settings)
    assert result["documents"]["number"] == 12
    assert result["documents"]["answers"] == "in words"
    assert any("1 of 14 rows were left out: 1 a missing image" in note for note in result["notes"])
    assert any("1 questions without an image were left out" in note for note in result["notes"])


@pytest.mark.thorough
def test_processors_with_more_than_pixels_are_asked_as_well(tmp_path, processor):
    """LLaVA-NeXT cuts an image into tiles: tokens by its shape, and its size is an input of its own."""
    from transformers import AutoModelForImageTextToText, LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    llava = make_model(processor).config
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaNextConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_index=llava.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    size = {"height": SIDE, "width": SIDE}
    tiles = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pinpoints)
    next_processor = LlavaNextProcessor(
        tiles,
        processor.tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    asker = make_asker(next_processor, [])
    task = open_task(make_settings(save(tmp_path, make_model(processor), processor), tmp_path), Store(tmp_path))
    asked = [
        Asked(example, [decode(example.images[0]).resize(shape)])
        for example, shape in zip(task.examples, [(30, 9), (9, 30), (20, 20)], strict=False)
    ]
    lengths = {int(row.sum()) for row in asker.prompts(asked)["attention_mask"]}
    assert len(lengths) > 1
    together = answer_freely(model, asker, asked, max_new_tokens=4, batch_size=3)
    alone = answer_freely(model, asker, asked, max_new_tokens=4, batch_size=1)
    assert together.given == alone.given
    chosen = choose_answers(model, asker, asked, DIGITS, batch_size=3)
    for one, found in zip(asked, chosen.log_probs, strict=True):
        text = asker.renderer.text(one.example.messages, to_answer=True)
        expected = naive_log_probs(model, next_processor, text, one.images[0], DIGITS)
        np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-3, atol=1e-3)


def test_the_tasks_and_their_attacks_have_the_same_names(untrained, tmp_path):
    assert TASKS.keys() == KINDS.keys()
    settings = make_settings(untrained, tmp_path, attacks=("all-images",), severities=(1, 3))
    assert settings.attacks == tuple(IMAGE_ATTACKS)
    random = sum(attack.is_random for attack in IMAGE_ATTACKS.values())
    assert len(settings.cases()) == 2 * (2 * random + len(IMAGE_ATTACKS) - random)


def test_what_cannot_be_asked_is_refused(untrained, processor, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"aaa is an attack on text, and --task vqa attacks images: .* --task text or"
    ):
        make_settings(untrained, output, attacks=("aaa",))
    with pytest.raises(ConfigError, match="did you mean `gaussian_noise`"):
        make_settings(untrained, output, attacks=("gausian_noise",))
    with pytest.raises(ConfigError, match="`answers` must be choose or free"):
        make_settings(untrained, output, answers="both")
    text = make_text_model("olmoe")
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"olmoe takes no images, .* --task vqa is for vision-language models"):
        evaluate_robustness(make_settings(tmp_path / "text", output))
    make_model(processor).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"bare`: .*no processor.* --tokenizer"):
        evaluate_robustness(make_settings(tmp_path / "bare", output))
    with pytest.raises(DataError, match=r"no such file; give `data.path` in a recipe"):
        evaluate_robustness(make_settings(untrained, output, data=str(tmp_path / "nowhere.json")))
    rows = [entry(number) for number in range(12)]
    for row in rows:
        row["conversations"][1]["value"] = "yes"
    path = write_llava(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"all answers are 'yes': let models answer, --answers free"):
        evaluate_robustness(make_settings(untrained, output, data=str(path)))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imagecorruptions" else find(name))
    with pytest.raises(DataError, match=r"need imagecorruptions-imaug, .* pip install 'symphony-hf\[images\]'"):
        evaluate_robustness(make_settings(untrained, output))
    assert not output.exists()
