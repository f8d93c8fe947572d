"""LLaVA's files: what is read, learned, cut, left out and refused; and the handwritten digits."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from visual import (
    PARTS_TEMPLATE,
    TEXT_TEMPLATE,
    TOKENS_PER_IMAGE,
    entry,
    make_processor,
    picture,
    write_llava,
)

from symphony_hf.data.blocks import NO_LABEL
from symphony_hf.data.images import llava as llava_module
from symphony_hf.data.images.decoding import decode, handwritten_digits
from symphony_hf.data.images.processors import Asked, VisualExample, make_asker
from symphony_hf.data.prepare import prepare_data
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.recipe import DataSection


@pytest.fixture
def processor(tokenizer):
    return make_processor(tokenizer)


def llava(path, processor, **settings):
    path = None if path is None else str(path)
    return prepare_data(DataSection(kind="llava", path=path, **settings), processor, seed=0)


def learned_text(row, processor):
    return processor.tokenizer.decode([label for label in row.labels if label != NO_LABEL])


# Reading


def test_rows_are_read_as_llava_is_published(tmp_path, processor):
    entries = [entry(0), entry(1, images=0), entry(2, images=2), entry(3, turns=3)]
    prepared = llava(write_llava(tmp_path, entries), processor)
    assert len(prepared.train) == 4
    assert (prepared.validation, prepared.test) == (None, None)
    images = [[Path(image["path"]).relative_to(tmp_path).as_posix() for image in row.images] for row in prepared.train]
    assert images == [
        ["coco/train2017/000000_0.jpg"],
        [],
        ["coco/train2017/000002_0.jpg", "coco/train2017/000002_1.jpg"],
        ["coco/train2017/000003_0.jpg"],
    ]
    assert learned_text(prepared.train[3], processor) == (
        " Answer 3 of turn 0.<|endoftext|> Answer 3 of turn 1.<|endoftext|> Answer 3 of turn 2.<|endoftext|>"
    )
    assert any("no row is held out" in note for note in prepared.notes)
    row = prepared.train[2]
    assert row.input_ids.count(prepared.collator.image_id) == 2
    assert prepared.num_tokens == sum(
        len(row.input_ids) + (TOKENS_PER_IMAGE - 1) * len(row.images) for row in prepared.train
    )


def test_images_may_be_in_a_folder_of_their_own(tmp_path, processor):
    (tmp_path / "pictures").mkdir()
    path = write_llava(tmp_path / "pictures", [entry(number) for number in range(3)])
    path = path.rename(tmp_path / "llava.json")
    prepared = llava(path, processor, images=str(tmp_path / "pictures"))
    assert len(prepared.train) == 3
    with pytest.raises(DataError, match="3 of 3 rows cannot be used: 3 a missing image"):
        llava(path, processor)
    with pytest.raises(DataError, match="`nowhere`: no such folder; give the one that the JSON's image names are in"):
        llava(path, processor, images="nowhere")


def test_a_folder_of_splits_is_kept(tmp_path, processor):
    path = write_llava(tmp_path, [entry(number) for number in range(6)])
    entries = json.loads(path.read_text())
    path.unlink()
    (tmp_path / "train.json").write_text(json.dumps(entries[:4]))
    (tmp_path / "val.json").write_text(json.dumps(entries[4:]))
    prepared = llava(tmp_path, processor)
    assert (len(prepared.train), len(prepared.validation), prepared.test) == (4, 2, None)


def test_a_limit_takes_rows_from_all_over(tmp_path, processor):
    prepared = llava(write_llava(tmp_path, [entry(number) for number in range(9)]), processor, limit=3)
    assert [Path(row.images[0]["path"]).name for row in prepared.train] == [f"00000{n}_0.jpg" for n in (0, 3, 6)]


def test_the_revision_is_that_of_the_json(tmp_path, processor):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = llava(write_llava(tmp_path / "one", [entry(1)]), processor)
    other = llava(write_llava(tmp_path / "other", [entry(1)]), processor)
    assert one.revision == other.revision
    assert llava(write_llava(tmp_path / "one", [entry(2)]), processor).revision != one.revision


# What is learned, under every kind of chat template


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (None, " Answer 0 of turn 0.<|endoftext|> Answer 0 of turn 1.<|endoftext|>"),
        (PARTS_TEMPLATE, " Answer 0 of turn 0.  Answer 0 of turn 1. "),
        (TEXT_TEMPLATE, "Answer 0 of turn 0.<|end|>\nAnswer 0 of turn 1.<|end|>\n<|endoftext|>"),
    ],
    ids=["given", "parts", "text"],
)
def test_the_answers_and_what_closes_them_are_learned(tmp_path, tokenizer, template, answers):
    processor = make_processor(tokenizer, template)
    prepared = llava(write_llava(tmp_path, [entry(0, images=2, turns=2)]), processor)
    row = prepared.train[0]
    assert learned_text(row, processor) == answers
    assert all(label in (NO_LABEL, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    assert NO_LABEL in row.labels


@pytest.mark.parametrize("template", [None, PARTS_TEMPLATE, TEXT_TEMPLATE], ids=["given", "parts", "text"])
def test_batches_have_the_tokens_and_pixels_that_the_processor_makes(tmp_path, tokenizer, template):
    processor = make_processor(tokenizer, template)
    entries = [entry(0), entry(1, images=2, turns=2), entry(2, images=0)]
    prepared = llava(write_llava(tmp_path, entries), processor)
    batch = prepared.collator(list(prepared.train))
    texts, images = [], []
    for row in prepared.train.rows:
        texts.append(prepared_text(processor, row["messages"], in_parts=template == PARTS_TEMPLATE))
        images += [decode(image) for image in row["images"]]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["pixel_values"].shape == (3, 3, 8, 8)
    assert (batch["labels"][batch["attention_mask"] == 0] == NO_LABEL).all()
    assert (batch["labels"][batch["input_ids"] == prepared.collator.image_id] == NO_LABEL).all()


def adding(tokenizer, form):
    """Let a tokenizer put special tokens around a text: `[BOS] $A`, for example."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "[BOS]"})
    tokens = [("[BOS]", tokenizer.bos_token_id), ("<|endoftext|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=tokens)
    return tokenizer


@pytest.mark.parametrize("template", [PARTS_TEMPLATE, "{{ bos_token }}" + PARTS_TEMPLATE], ids=["bare", "with BOS"])
@pytest.mark.parametrize("form", ["[BOS] $A", "$A"])
def test_a_conversation_begins_as_transformers_lets_it(tmp_path, tokenizer, template, form):
    processor = make_processor(adding(tokenizer, form), PARTS_TEMPLATE)
    processor.chat_template = template
    prepared = llava(write_llava(tmp_path, [entry(0), entry(1)]), processor)
    batch = prepared.collator([prepared.train[0]])
    row = prepared.train.rows[0]
    image = decode(row["images"][0])
    messages = parted(row["messages"])
    messages[0]["content"][0]["image"] = image
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum() == int("bos" in template or "BOS" in form)
    assert " Answer 0 of turn 0. " in learned_text(prepared.train[0], processor)
    asked = Asked(VisualExample("0", row["messages"][:1], row["images"], "it"), [image])
    prompt = make_asker(processor, []).prompts([asked])["input_ids"]
    start = processor.apply_chat_template(
        messages[:1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert torch.equal(prompt, start["input_ids"])


def test_no_end_of_text_is_added_to_what_is_to_be_answered(tmp_path, tokenizer):
    processor = make_processor(adding(tokenizer, "[BOS] $A <|endoftext|>"), PARTS_TEMPLATE)
    prepared = llava(write_llava(tmp_path, [entry(0)]), processor)
    assert not {processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id} & set(prepared.train[0].input_ids)


def prepared_text(processor, messages, in_parts):
    if not in_parts:
        return processor.tokenizer.apply_chat_template(messages, tokenize=False)
    return processor.apply_chat_template(parted(messages), tokenize=False)


def parted(messages):
    found = []
    for message in messages:
        *images, text = message["content"].split("<image>\n")
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        found.append({"role": message["role"], "content": parts})
    return found


def test_a_template_that_loses_images_is_refused(tmp_path, tokenizer):
    processor = make_processor(tokenizer)
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(
        DataError, match="the chat template of LlavaProcessor drops the text or the image of a question"
    ):
        llava(write_llava(tmp_path, [entry(0)]), processor)


# Cutting


def test_long_answers_are_cut_but_images_never(tmp_path, processor):
    path = write_llava(tmp_path, [entry(0, turns=9)])
    whole = llava(path, processor).train[0]
    cut = llava(path, processor, block_size=60).train[0]
    assert len(cut.input_ids) == 60 - (TOKENS_PER_IMAGE - 1)
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert cut.labels == whole.labels[: len(cut.input_ids)]
    batch = llava(path, processor, block_size=60).collator([cut])
    assert batch["input_ids"].shape == (1, 60)


def test_rows_whose_images_or_answers_do_not_fit_are_left_out_and_counted(tmp_path, processor):
    entries = [entry(number) for number in range(40)]
    entries[7] = entry(7, images=30)
    entries[8]["conversations"][0]["value"] = "<image>\n" + "why " * 100
    path = write_llava(tmp_path, entries)
    prepared = llava(path, processor, block_size=100)
    assert len(prepared.train) == 38
    note = next(note for note in prepared.notes if "left out" in note)
    assert "2 of 40 rows were left out: " in note
    assert "1 images longer than block_size" in note
    assert "1 a question longer than block_size" in note


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_the_last_token_of_an_image_fits_or_the_row_is_left_out(tmp_path, processor, room):
    """The answer comes first here, so that the image alone decides."""
    row = entry(0, turns=2)
    row["conversations"][0]["value"], row["conversations"][2]["value"] = "What?", "And this? <image>"
    whole = llava(write_llava(tmp_path, [row]), processor).train[0]
    end = whole.input_ids.index(whole.input_ids[-1] * 0 + processor.image_token_id) + TOKENS_PER_IMAGE
    if room < 0:
        with pytest.raises(DataError, match=f"images longer than block_size: the last ends at token {end}"):
            llava(tmp_path / "llava.json", processor, block_size=end + room)
        return
    prepared = llava(tmp_path / "llava.json", processor, block_size=end + room)
    ids = prepared.collator(list(prepared.train))["input_ids"][0].tolist()
    assert len(ids) == end + room
    assert ids.count(processor.image_token_id) == TOKENS_PER_IMAGE


# Bad rows and images


def test_missing_and_broken_images_are_counted_and_left_out(tmp_path, processor):
    entries = [entry(number) for number in range(40)]
    path = write_llava(tmp_path, entries, leave_out=[entries[3]["image"]])
    (tmp_path / entries[5]["image"]).write_text("no image")
    whole = (tmp_path / entries[6]["image"]).read_bytes()
    (tmp_path / entries[6]["image"]).write_bytes(whole[: len(whole) // 2])
    picture(0).save(tmp_path / "whole.png")
    broken = bytearray((tmp_path / "whole.png").read_bytes())
    broken[-40] ^= 255
    (tmp_path / entries[7]["image"]).write_bytes(broken)
    prepared = llava(path, processor)
    assert len(prepared.train) == 36
    left_out = f"{path}, train split: 4 of 40 rows were left out: 3 an image that does not decode, 1 a missing image"
    assert left_out in prepared.notes
    for row in prepared.train:
        decode(row.images[0])


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_gray_values_of_16_bits_are_scaled(mode, tmp_path):
    ramp = np.linspace(0, 65535, 64).astype("uint16").reshape(8, 8)
    image = PIL.Image.fromarray(ramp if mode == "I;16" else ramp.astype("int32"))
    assert image.mode == mode
    image.save(tmp_path / "ramp.tiff")
    decoded = np.asarray(decode({"path": str(tmp_path / "ramp.tiff"), "bytes": None}))
    assert decoded[..., 0].flatten().tolist() == [round(value / 257) for value in ramp.flatten().tolist()]


def test_too_many_missing_images_are_an_error_that_names_the_first(tmp_path, processor):
    entries = [entry(number) for number in range(20)]
    path = write_llava(tmp_path, entries, leave_out=[row["image"] for row in entries[4:7]])
    with pytest.raises(
        DataError, match=r"3 of 20 rows cannot be used: 3 a missing image. The first is row 4 \(.*000004_0"
    ):
        llava(path, processor)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"conversations": None}, "no list of turns"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "no answer"),
        ({"conversations": [{"from": "human", "value": None, "tool_calls": [1]}]}, "a turn without text"),
        ({"image": 12345}, "no name of an image: int, '12345'"),
        ({"image": [None]}, "no name of an image"),
        ({"image": float("nan")}, "another number of images than of <image>: 0 and 1"),
        ({"image": None}, "another number of images than of <image>: 0 and 1"),
        ({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}, "1 and 0"),
    ],
)
def test_bad_rows_are_said(tmp_path, processor, change, problem):
    path = write_llava(tmp_path, [entry(0)])
    path.write_text(json.dumps([entry(0) | change, *([] if change.get("conversations") is not None else [entry(0)])]))
    with pytest.raises(DataError, match=problem):
        llava(path, processor)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1, "image": "a.jpg"}', "expected a JSON list of conversations, got an object with `id`, `image`"),
        ("[]", "expected a JSON list of conversations, got list"),
        ('[{"text": "x"}]', "no entry has `conversations`; the first is an object with `text`"),
        ('[{"id": ', "no JSON"),
    ],
)
def test_a_json_of_something_else_is_refused(tmp_path, processor, text, message):
    (tmp_path / "llava.json").write_text(text)
    with pytest.raises(DataError, match=message):
        llava(tmp_path / "llava.json", processor)


def test_no_such_file_and_no_image_at_all_are_refused(tmp_path, processor):
    with pytest.raises(DataError, match=r"nothing.json`: no such file; give `data.path` .* or `--data`: LLaVA's JSON"):
        llava(tmp_path / "nothing.json", processor)
    with pytest.raises(DataError, match=r"no train.json in this folder \(no JSON\)"):
        llava(tmp_path, processor)
    with pytest.raises(DataError, match="no conversation has an image: use `kind: chat` for text"):
        llava(write_llava(tmp_path, [entry(0, images=0)]), processor)


def test_an_image_that_was_broken_after_the_check_is_named(tmp_path, processor):
    prepared = llava(write_llava(tmp_path, [entry(0)]), processor)
    path = Path(prepared.train[0].images[0]["path"])
    path.write_text("no image any more")
    with pytest.raises(DataError, match=r"000000_0.jpg does not decode any more"):
        prepared.collator([prepared.train[0]])


def test_a_processor_that_does_not_fit_is_refused(tmp_path, tokenizer, processor):
    path = write_llava(tmp_path, [entry(0)])
    processor.patch_size = None
    with pytest.raises(DataError, match="LlavaProcessor has no `patch_size`"):
        llava(path, processor)
    bare = make_processor(tokenizer)
    bare.tokenizer = tokenizer
    with pytest.raises(DataError, match=r"the tokenizer has no token '<image>': add it"):
        llava(path, bare)
    with pytest.raises(ConfigError, match="`name` is a setting of data sets on the Hub"):
        llava(path, processor, name="small")
    with pytest.raises(ConfigError, match="`kind: text` needs a tokenizer, got LlavaProcessor"):
        prepare_data(DataSection(), processor, seed=0)


def test_a_missing_package_is_named_with_its_command(processor, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    for module, package in (("PIL", "pillow"), ("sklearn", "scikit-learn")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, m=module: None if name == m else found(name))
        with pytest.raises(DataError, match=rf"need {package}, .*: pip install 'symphony-hf\[vision\]'"):
            llava(None, processor)


# The cache, and several processes


def test_images_are_checked_and_texts_tokenized_once(tmp_path, processor, monkeypatch):
    path = write_llava(tmp_path, [entry(number) for number in range(3)])
    first = [llava(path, processor).train[index] for index in range(3)]

    def fail(*args, **kwargs):
        raise AssertionError("checked again")

    monkeypatch.setattr(llava_module, "encoded_problem", fail)
    again = [llava(path, processor).train[index] for index in range(3)]
    assert again == first
    with pytest.raises(AssertionError, match="checked again"):
        llava(path, processor, block_size=200)


@pytest.mark.parametrize("before", [None, b"no image"])
def test_an_image_that_was_mended_is_used(before, tmp_path, processor):
    """What was wrong with it is in the cache."""
    path = write_llava(tmp_path, [entry(number) for number in range(12)])
    image = next(file for file in sorted(path.parent.rglob("*.*")) if file != path)
    good = image.read_bytes()
    image.unlink() if before is None else image.write_bytes(before)
    assert len(llava(path, processor).train) == 11
    image.write_bytes(good)
    assert len(llava(path, processor).train) == 12


def test_many_rows_are_checked_on_several_processes(tmp_path, processor, monkeypatch):
    entries = [entry(number) for number in range(12)]
    path = write_llava(tmp_path, entries)
    expected = list(llava(path, processor).train)
    monkeypatch.setattr(llava_module, "_MANY", 10)
    monkeypatch.setattr(llava_module.os, "cpu_count", lambda: 2)
    prepared = llava(path, processor, block_size=255)  # another size, so that nothing is found in the cache
    assert list(prepared.train) == expected


def test_images_are_decoded_by_the_dataloaders_workers(tmp_path, processor):
    prepared = llava(write_llava(tmp_path, [entry(number, images=number % 2) for number in range(6)]), processor)

    def batches(**settings):
        return list(DataLoader(prepared.train, batch_size=2, collate_fn=Noting(prepared.collator), **settings))

    own, workers = batches(), batches(num_workers=2)
    assert {pid for pid, _ in own} == {os.getpid()}
    assert os.getpid() not in {pid for pid, _ in workers}
    for (_, one), (_, other) in zip(own, workers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


class Noting:
    """A collator that tells which process it ran in."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows):
        return os.getpid(), self.collator(rows)


# The handwritten digits


@pytest.mark.thorough
def test_digits_are_real_images_in_three_splits(processor):
    prepared = llava(None, processor, block_size=128)
    sizes = [len(getattr(prepared, split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    assert min(sizes[1:]) > 50
    images, digits = handwritten_digits()
    by_bytes = {image["bytes"]: digit for image, digit in zip(images, digits, strict=True)}
    for split in ("train", "validation", "test"):
        rows = getattr(prepared, split)
        row = rows[11]
        assert learned_text(row, processor) == f" The digit is {by_bytes[row.images[0]['bytes']]}.<|endoftext|>"
        assert decode(row.images[0]).size == (8, 8)
    assert prepared.notes[-1].startswith("scikit-learn's handwritten digits: ")
    assert prepared.revision == llava(None, processor, limit=2).revision
