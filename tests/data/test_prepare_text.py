"""Recipes' text: in blocks from the cache, and as a stream."""

import itertools
import json
import types

import datasets
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import OlmoeConfig, default_data_collator

from symphony_hf.data import streams as streams_module
from symphony_hf.data.blocks import pack_blocks
from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.documents import split_of
from symphony_hf.data.prepare import prepare_data
from symphony_hf.data.prepared import check_lengths
from symphony_hf.data.streams import EndlessStream
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.recipe import DataSection

ROWS = [f"Row {number} has some text of its own, and a little more: {number * 7919}." for number in range(400)]
BLOCK = 16


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row, "id": number}) + "\n" for number, row in enumerate(ROWS)))
    return str(path)


def rows_of(columns):
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


@pytest.fixture
def hub(monkeypatch):
    """Stand in for a streamed data set of the Hub with these splits. Its commit is the letter a, forty times."""
    offered = {}

    def builder(name, config=None, revision=None):
        splits, asked = offered[name, config]
        asked.append(revision)
        streams = {
            split: datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"columns": columns})
            for split, columns in splits.items()
        }
        return types.SimpleNamespace(as_streaming_dataset=lambda: streams, hash="a" * 40)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return offered


def section(path, **settings):
    return DataSection(path=path, block_size=BLOCK, **settings)


def ids_of(blocks):
    return torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks])


def test_blocks_are_those_of_the_corpus(table, tokenizer):
    corpus = load_corpus(table)
    prepared = prepare_data(section(table), tokenizer, seed=0)
    for split in ("train", "validation", "test"):
        expected = pack_blocks(getattr(corpus, split), tokenizer, BLOCK)
        assert torch.equal(ids_of(getattr(prepared, split)), expected)
    assert prepared.documents == corpus.test
    assert prepared.kind == "text"
    assert prepared.collator is None
    assert prepared.num_tokens == ids_of(prepared.train).numel()
    assert prepared.notes == [
        f"{table}: {len(corpus.train)} train documents, {len(corpus.validation)} validation documents, "
        f"{len(corpus.test)} test documents"
    ]


@pytest.mark.parametrize("setting", [{"text_column": "body"}, {"rows": "lines"}])
@pytest.mark.parametrize("form", ["file", "folder", "split files"])
def test_settings_of_tables_are_noted_for_text_files(tokenizer, tmp_path, form, setting):
    names = [f"{split}.txt" for split in ("train", "validation", "test")]
    if form == "folder":
        names = [f"{number}.txt" for number in range(200)]
    for name in names:
        (tmp_path / name).write_text("\n\n".join(ROWS))
    path = str(tmp_path / names[0] if form == "file" else tmp_path)
    plain, noted = (prepare_data(section(path, **given), tokenizer, seed=0) for given in ({}, setting))
    ((name, value),) = setting.items()
    assert noted.notes == [*plain.notes, f"data: `{name}: {value}` has no effect: `{path}` has no table"]
    assert noted.revision == plain.revision


def test_a_folder_of_tables_is_not_said_to_have_none(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "A row."}\n')
    with pytest.raises(DataError, match=r"no text file in this folder, and `rows.jsonl` is a table .*give the table"):
        prepare_data(section(str(tmp_path), text_column="body"), tokenizer, seed=0)


def test_settings_of_tables_are_taken_for_those_of_a_folder(tokenizer, tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    assert len(prepare_data(section(str(tmp_path), text_column="body"), tokenizer, seed=0).documents) == len(ROWS)


def test_the_revision_is_that_of_the_text(table, tokenizer, tmp_path):
    first = prepare_data(section(table), tokenizer, seed=0).revision
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert prepare_data(section(str(copy)), tokenizer, seed=1).revision == first
    copy.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS[1:]))
    assert prepare_data(section(str(copy)), tokenizer, seed=1).revision != first


def test_packed_blocks_have_the_same_tokens_and_positions(table, tokenizer):
    plain, packed = (prepare_data(section(table, packing=packing), tokenizer, seed=0) for packing in (False, True))
    assert torch.equal(ids_of(plain.train), ids_of(packed.train))
    batch = next(iter(DataLoader(packed.train, batch_size=9, collate_fn=default_data_collator)))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert (batch["position_ids"] == 0).sum() > 9


def test_a_limit_takes_documents_from_all_over_the_same_for_every_seed(table, tokenizer):
    whole = load_corpus(table)
    limited = [prepare_data(section(table, limit=10), tokenizer, seed=seed) for seed in (0, 1)]
    assert torch.equal(ids_of(limited[0].train), ids_of(limited[1].train))
    assert len(limited[0].documents) == 10
    expected = [whole.train[number * len(whole.train) // 10] for number in range(10)]
    assert torch.equal(ids_of(limited[0].train), pack_blocks(expected, tokenizer, BLOCK))


def test_a_test_split_that_fills_no_block_is_measured_by_document(tmp_path, tokenizer):
    for split, texts in (("train", ROWS), ("validation", ROWS[:9]), ("test", ["short"])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare_data(section(str(tmp_path)), tokenizer, seed=0)
    assert prepared.test is None
    assert [document.text for document in prepared.documents] == ["short"]


def test_a_validation_split_that_fills_no_block_is_refused_where_it_is_needed(tmp_path, tokenizer):
    for split, texts in (("train", ROWS), ("validation", ["short"]), ("test", ROWS[:9])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for train in (None, {"eval_strategy": "no"}, {"eval_strategy": False}):
        assert prepare_data(section(str(tmp_path)), tokenizer, seed=0, train=train).validation is None
    with pytest.raises(DataError, match=rf"{tmp_path}, validation split: 1 documents have \d+ tokens, less than one"):
        prepare_data(section(str(tmp_path)), tokenizer, seed=0, train={"eval_strategy": "steps"})
    with pytest.raises(DataError, match=rf"{tmp_path}, train split: 400 documents have .* less than one block"):
        prepare_data(DataSection(path=str(tmp_path), block_size=100_000), tokenizer, seed=0)


def test_a_revision_and_a_configuration_reach_the_hub(monkeypatch, tokenizer):
    asked = []

    def load_dataset(name, config=None, revision=None):
        asked.append((name, config, revision))
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ROWS})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare_data(section("owner/name", name="small", revision="v1"), tokenizer, seed=0)
    assert asked == [("owner/name", "small", "v1")]
    with pytest.raises(DataError, match="path `owner/name:large` gives one configuration and name `small` another"):
        prepare_data(section("owner/name:large", name="small"), tokenizer, seed=0)


def test_the_commit_of_a_cached_data_set_is_its_revision(monkeypatch, tokenizer, tmp_path):
    """`datasets` keeps what it read from the Hub in a folder named after the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = tmp_path / "owner___name" / "default" / "0.0.0" / commit / "name-train.arrow"
    file.parent.mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"text": ROWS}).map(lambda row: row, cache_file_name=str(file))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: datasets.DatasetDict({"train": rows}))
    assert prepare_data(section("owner/name"), tokenizer, seed=0).revision == commit


def test_a_builder_of_the_hub_is_cached_under_its_commit(tmp_path):
    """The test above relies on this: the last folder of a builder's cache is its `hash`."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "some"}))
    builder = datasets.load_dataset_builder("json", data_files=str(tmp_path / "rows.jsonl"))
    assert builder.cache_dir.rstrip("/").endswith(builder.hash)


# Streams


def naive_stream(texts, tokenizer):
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [ids[start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]


def test_a_stream_has_the_training_documents_cut_into_blocks(table, tokenizer, monkeypatch):
    monkeypatch.setattr(streams_module, "SHUFFLED", 1)  # so that the order is that of the file
    monkeypatch.setattr(streams_module, "TOKENIZED", 10_000)
    corpus = load_corpus(table)
    prepared = prepare_data(section(table, streaming=True), tokenizer, seed=0)
    blocks = [block["input_ids"] for block in prepared.train]
    assert blocks == naive_stream([document.text for document in corpus.train], tokenizer)
    assert {document.text for document in prepared.documents} == {document.text for document in corpus.test}
    expected = pack_blocks(corpus.validation, tokenizer, BLOCK)
    assert torch.equal(ids_of(prepared.validation), expected)
    assert "read while training goes on" in prepared.notes[0]


def test_a_stream_is_read_in_an_order_of_the_seed(table, tokenizer):
    def blocks(seed):
        return [
            block["input_ids"] for block in prepare_data(section(table, streaming=True), tokenizer, seed=seed).train
        ]

    assert blocks(0) == blocks(0)
    assert blocks(0) != blocks(1)


def test_no_block_of_a_stream_reaches_into_the_next_batch_of_documents(table, tokenizer, monkeypatch):
    monkeypatch.setattr(streams_module, "SHUFFLED", 1)
    monkeypatch.setattr(streams_module, "TOKENIZED", 50)
    texts = [document.text for document in load_corpus(table).train]
    prepared = prepare_data(section(table, streaming=True), tokenizer, seed=0)
    expected = []
    for start in range(0, len(texts), 50):
        expected += naive_stream(texts[start : start + 50], tokenizer)
    assert [block["input_ids"] for block in prepared.train] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_passes_over_a_stream_are_one_stream_without_end(table, tokenizer, workers):
    stream = prepare_data(section(table, streaming=True, limit=20), tokenizer, seed=0).train
    size = len(ids_of(stream))
    endless, one_pass = (
        DataLoader(rows, batch_size=None, num_workers=workers) for rows in (EndlessStream(stream), stream)
    )
    passes = ids_of(itertools.islice(endless, 3 * size)).view(3, size, BLOCK)
    for number in range(3):
        stream.set_epoch(number)  # as Trainer does
        assert torch.equal(passes[number], ids_of(one_pass))
    assert not torch.equal(passes[1], passes[0])
    assert not torch.equal(passes[2], passes[1])


def test_a_packed_stream_can_be_batched(table, tokenizer):
    prepared = prepare_data(section(table, streaming=True, packing=True), tokenizer, seed=0)
    batch = next(iter(DataLoader(prepared.train, batch_size=4, collate_fn=default_data_collator)))
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    starts = batch["position_ids"][:, 1:] == 0
    assert starts.any()
    assert (batch["labels"][:, 1:][starts] == -100).all()
    assert (batch["labels"][:, 1:][~starts] == batch["input_ids"][:, 1:][~starts]).all()


def test_a_stream_of_the_hub_keeps_its_splits_and_tells_its_commit(hub, tokenizer):
    asked = []
    hub["owner/name", "small"] = {"train": {"text": ROWS}, "test": {"text": ["", *ROWS[:20]]}}, asked
    prepared = prepare_data(section("owner/name", name="small", revision="v1", streaming=True), tokenizer, seed=0)
    assert prepared.revision == "a" * 40
    assert asked == ["v1"]
    assert [document.text for document in prepared.documents] == ROWS[:20]  # the blank one is left out
    held_out = [row for row in ROWS if split_of(row) == "validation"]
    assert torch.equal(ids_of(prepared.validation), torch.tensor(naive_stream(held_out, tokenizer)))


def test_a_limit_ends_a_stream(hub, tokenizer):
    hub["owner/name", None] = {split: {"text": ROWS} for split in ("train", "validation", "test")}, []
    prepared = prepare_data(section("owner/name", streaming=True, limit=20), tokenizer, seed=0)
    assert sum(1 for _ in prepared.train) == len(naive_stream(ROWS[:20], tokenizer))
    assert len(prepared.documents) == 20


def folder_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    return str(tmp_path)


def test_what_cannot_stream_is_refused(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match="the library sources of the running Python cannot be streamed: give a data set"
    ):
        prepare_data(section(None, streaming=True), tokenizer, seed=0)
    for path in (folder_of_text(tmp_path), str(tmp_path / "a.txt")):
        with pytest.raises(DataError, match="cannot be streamed: give a data set of the Hub or a table"):
            prepare_data(section(path, streaming=True), tokenizer, seed=0)
    for kind in ("chat", "glue", "llava"):
        with pytest.raises(DataError, match=f"only text can be streamed, not {kind}"):
            prepare_data(DataSection(kind=kind, name="qnli", streaming=True), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"body": ROWS}}, r"train split: no column `text` \(text_column\); known names: body"),
        ({"train": {"texts": ROWS}}, "did you mean `texts`"),
        ({"train": {"text": list(range(9))}}, "column `text` .* is int, not text"),
        ({"train": {"text": []}}, "train split: no rows"),
        ({"test": {"text": ROWS}}, "no train split; its splits are test"),
        ({"train": {"text": ROWS}, "test": {"text": [" "]}}, "the test split has no text"),
        ({"train": {"text": ROWS[:2]}, "test": {"text": ROWS}, "validation": {"text": ROWS}}, "do not fill one block"),
    ],
)
def test_bad_streams_are_refused(hub, tokenizer, splits, message):
    hub["owner/name", None] = splits, []
    long = DataSection(path="owner/name", block_size=400, streaming=True)
    with pytest.raises(DataError, match=message):
        prepare_data(long, tokenizer, seed=0)


def test_a_broken_table_cannot_be_streamed(tmp_path, tokenizer):
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match=r"broken\.jsonl, train split: cannot be read"):
        prepare_data(section(str(tmp_path / "broken.jsonl"), streaming=True), tokenizer, seed=0)


# Settings that do not fit


def test_settings_of_another_kind_are_refused(tokenizer):
    for kind in ("glue", "llava"):
        with pytest.raises(ConfigError, match=f"only text and chat can be packed, not {kind}"):
            prepare_data(DataSection(kind=kind, name="qnli", packing=True), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="only `kind: llava` has images, not text"):
        prepare_data(DataSection(images="folder"), tokenizer, seed=0)
    for settings in ({"revision": "v1"}, {"name": "small"}, {"revision": "v1", "path": __file__}):
        with pytest.raises(ConfigError, match="is a setting of data sets on the Hub, and this one is not from there"):
            prepare_data(DataSection(**settings), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="is a setting of data sets on the Hub"):
        prepare_data(DataSection(kind="glue", name="qnli", path="embedded", revision="v1"), tokenizer, seed=0)
    for kind in ("text", "chat"):
        with pytest.raises(ConfigError, match="without `path`, there is no column `body`"):
            prepare_data(DataSection(kind=kind, text_column="body"), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="without `path`, the images are scikit-learn's digits"):
        prepare_data(DataSection(kind="llava", images="folder"), tokenizer, seed=0)
    with pytest.raises(ConfigError, match="needs a LlavaProcessor, got Tok"):
        prepare_data(DataSection(kind="llava"), tokenizer, seed=0)


def test_sequences_longer_than_the_models_are_refused():
    config = OlmoeConfig(max_position_embeddings=32)
    check_lengths(DataSection(block_size=32), config)
    with pytest.raises(DataError, match=r"block_size: 33 tokens are more than olmoe has positions for .* 32 at most"):
        check_lengths(DataSection(block_size=33), config)
