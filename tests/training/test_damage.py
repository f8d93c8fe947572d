"""`data.damage`: training input is damaged as `symphony eval` damages text, and what was damaged is not scored."""

import pytest
import torch
from small_runs import RECIPE, recipe_overrides
from transformers import TrainerState

from symphony_hf.data.blocks import NO_LABEL, BlockDataset
from symphony_hf.data.documents import Document
from symphony_hf.data.packing import make_block
from symphony_hf.data.prepared import PreparedData
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, SymphonyWarning
from symphony_hf.evaluation.attacks.text import find_text_attack
from symphony_hf.recipe import load_recipe
from symphony_hf.training.damage import Damage, DamagedRows, DamageEpochs, damage_of, damaged, left_alone
from symphony_hf.training.runner import prepare_run, run_recipe

TEXTS = [f"the quick brown fox number {n} jumps over dog {n % 7}\nand runs away\n" for n in range(40)]
CHINESE = [f"机器翻译的质量取决于数据{n}和模型的规模\n" for n in range(40)]
KEYBOARD = Damage(attack="keyboard", rate=0.1)


@pytest.fixture(scope="module", params=["bpe", "words", "characters"])
def tokenizer(request):
    return train_tokenizer([Document(str(n), text) for n, text in enumerate(TEXTS)], 400, request.param)


def rows_of(tokenizer, damage=KEYBOARD, seed=0, size=48):
    ids = [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    blocks = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    return DamagedRows(BlockDataset(blocks), damage, tokenizer, seed), blocks


def test_rows_are_those_of_a_loop_over_documents(tokenizer):
    rows, blocks = rows_of(tokenizer)
    attack = find_text_attack("keyboard")
    for index in range(6):
        documents, current = [], []
        for token in blocks[index].tolist():
            current.append(token)
            if token == tokenizer.eos_token_id:
                documents.append(current)
                current = []
        documents += [current] if current else []
        texts = [tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id]) for ids in documents]
        lines = iter(attack("\n".join(texts), 0.1, seed=0, name=f"0 {index}").split("\n"))
        wanted = []
        for ids, text in zip(documents, texts, strict=True):
            damaged = "\n".join(next(lines) for _ in text.split("\n"))
            wanted += tokenizer(damaged)["input_ids"]
            wanted += [token for token in ids if token == tokenizer.eos_token_id]
        row = rows[index]
        assert row["input_ids"].tolist() == (wanted + [tokenizer.eos_token_id] * 48)[:48]
        assert row["labels"].shape == (48,)
        scored = row["labels"] != NO_LABEL
        assert torch.equal(row["labels"][scored], row["input_ids"][scored])
        assert 0 < scored.sum() < 48


def test_damaged_characters_are_the_ones_that_are_not_scored():
    tokenizer = train_tokenizer([Document("0", "".join(TEXTS))], 400, "characters")
    rows, blocks = rows_of(tokenizer)
    for index in range(6):
        row = rows[index]
        changed = row["input_ids"] != blocks[index]  # a letter becomes a letter, so no position moves
        assert changed.any()
        assert (row["labels"][changed] == NO_LABEL).all()
        assert torch.equal(row["labels"][~changed], blocks[index][~changed])


def test_each_epoch_has_damage_of_its_own_and_repeats_it(tokenizer):
    rows, _ = rows_of(tokenizer)
    state = TrainerState()
    callback, seen = DamageEpochs(rows), []
    for epoch in (0.0, 0.9999999, 0.5, 1.0):
        state.epoch = epoch
        callback.on_epoch_begin(None, state, None)
        seen.append(torch.stack([rows[index]["input_ids"] for index in range(4)]))
    assert torch.equal(seen[0], seen[2])  # resumed in the middle of the first epoch
    assert torch.equal(seen[1], seen[3])  # the second one, by a sum of shares
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(rows_of(tokenizer, seed=1)[0][0]["input_ids"], seen[0][0])


def test_a_rate_of_0_changes_nothing(tokenizer):
    rows, blocks = rows_of(tokenizer, Damage(attack="keyboard", rate=0.0))
    assert torch.equal(rows[3]["input_ids"], blocks[3])
    assert torch.equal(rows[3]["labels"], blocks[3])


@pytest.mark.parametrize("name", ["word_drop", "char_insert", "aaa"])
def test_packed_documents_keep_their_places(tokenizer, name):
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS[:4]]
    flat = torch.tensor([token for part in ids for token in part]).numpy()
    starts = torch.tensor([0, len(ids[0]), len(ids[0]) + len(ids[1])]).numpy()
    row = DamagedRows([make_block(flat, starts)], Damage(attack=name, rate=0.3), tokenizer, 0)[0]
    assert {len(row[column]) for column in ("input_ids", "labels", "position_ids")} == {len(flat)}
    begins = (row["position_ids"] == 0).nonzero().flatten()
    assert begins[0] == 0
    assert (row["labels"][begins[:3]] == NO_LABEL).all()  # nothing precedes a document's first token
    steps = row["position_ids"].diff()
    assert ((steps == 1) | (row["position_ids"][1:] == 0)).all()


@pytest.mark.parametrize(("name", "least", "changed"), [("aaa", "line", 3), ("keyboard", "row", 1)])
def test_a_description_says_the_least_that_is_damaged(name, least, changed):
    """At a share of which nothing would be left, in a row of three lines."""
    tokenizer = train_tokenizer([Document("0", "".join(TEXTS))], 400, "characters")
    damage = Damage(attack=name, rate=0.001)
    assert f"{name} at 0.001, at least one in each {least} (" in damage.describe()
    assert "at least" not in Damage(attack=name, rate=0.0).describe()
    text = "the quick fox\njumps over dogs\nand runs"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    row = DamagedRows(BlockDataset(ids), damage, tokenizer, 0)[0]
    before, after = text.split(), tokenizer.decode(row["input_ids"]).split()
    assert sum(old != new for old, new in zip(before, after, strict=True)) == changed


def test_left_alone_is_what_both_have_in_order():
    assert left_alone([1, 2, 3, 4], [1, 9, 3, 4]) == [True, False, True, True]
    assert left_alone([1, 2, 3], [1, 2, 8, 9, 3]) == [True, True, False, False, True]
    assert left_alone([1, 2, 3], []) == []


def test_a_tokenizer_that_does_not_read_back_is_refused(tokenizer, monkeypatch):
    rows, _ = rows_of(tokenizer)
    monkeypatch.setattr(rows, "_decode", lambda ids: "other text")
    with pytest.raises(ConfigError, match="of its tokens back"):
        rows.check_tokenizer()


def damage_texts(texts, name, rate=0.1, size=48):
    tokenizer = train_tokenizer([Document(str(n), text) for n, text in enumerate(texts)], 400, "characters")
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    blocks = torch.tensor(ids[: len(ids) // size * size]).view(-1, size)
    damage = Damage(attack=name, rate=rate)
    return damaged(PreparedData("text", BlockDataset(blocks)), damage, tokenizer, seed=0)


@pytest.mark.parametrize("name", ["aaa", "word_drop", "word_shuffle"])
def test_damage_of_words_needs_spaces_between_them(name):
    with pytest.raises(
        ConfigError, match=rf"^data: damage: .*{name} changes words, and no spaces separate .* char_swap"
    ):
        damage_texts(CHINESE, name)
    damage_texts(CHINESE, "char_swap")
    damage_texts(CHINESE, name, rate=0.0)
    damage_texts(TEXTS, name)


def test_rows_without_spaces_among_others_are_counted_wherever_they_are():
    with pytest.warns(SymphonyWarning, match=r"^data: damage: .*no spaces separate the words in [234] of 8 texts"):
        damage_texts(TEXTS + CHINESE, "aaa")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.damage": {"attack": "keyboard", "rate": 1.5}}, "`rate` is a share of words or letters, .* got 1.5"),
        ({"data.damage": {"attack": "keyboard", "rate": -0.1}}, "`rate` is a share of words or letters, .* got -0.1"),
        ({"data.damage": {"attack": "keybord", "rate": 0.1}}, "'keybord'; did you mean `keyboard`"),
        ({"data.damage": {"attack": "keyboard", "share": 0.1}}, "unknown setting `share`"),
        (
            {"data.damage": {"attack": "keyboard", "rate": 0.1}, "data.kind": "chat", "eval.documents": 200},
            "not data of kind `chat`",
        ),
        ({"data.damage": {"attack": "keyboard", "rate": 0.1}, "data.streaming": True}, "not a stream"),
        (
            {
                "data.damage": {"attack": "keyboard", "rate": 0.1},
                "train.dataloader_persistent_workers": True,
                "train.dataloader_num_workers": 1,
            },
            "they would repeat its damage in every epoch",
        ),
    ],
)
def test_what_cannot_be_damaged_is_refused_before_anything_is_written(settings, message, tmp_path):
    recipe = load_recipe(RECIPE, {**recipe_overrides(tmp_path), **settings})
    with pytest.raises(ConfigError, match=message):
        prepare_run(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_run_under_damage_says_so_and_trains_otherwise(tmp_path):
    overrides = recipe_overrides(tmp_path)
    damage = {"data.damage": {"attack": "keyboard", "rate": 0.2}}
    results = run_recipe(load_recipe(RECIPE, {**overrides, **damage}))
    assert any("damaged anew in each epoch: keyboard at 0.2" in note for note in results["data"]["notes"])
    assert "keyboard at 0.2" in (tmp_path / "run" / "report.md").read_text()
    assert damage_of(load_recipe(RECIPE, overrides)) is None
