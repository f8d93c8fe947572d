"""Blocks and windows against a naive concatenation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from symphony_hf.data import blocks
from symphony_hf.data.blocks import BlockDataset, document_windows, pack_blocks, token_stream
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer
from symphony_hf.errors import ConfigError, DataError


def naive_token_ids(documents, tokenizer):
    """Tokenize one document at a time, each followed by the end-of-text token."""
    return [
        [*tokenizer.convert_tokens_to_ids(tokenizer.tokenize(document.text)), tokenizer.eos_token_id]
        for document in documents
    ]


def as_documents(texts):
    return [Document(str(index), text) for index, text in enumerate(texts)]


some_documents = st.lists(st.text(max_size=40), min_size=1, max_size=8).map(as_documents)


@given(documents=some_documents, block_size=st.integers(2, 9))
def test_blocks_are_the_concatenated_documents_cut_evenly(trained_tokenizer, documents, block_size):
    flat = [token_id for token_ids in naive_token_ids(documents, trained_tokenizer) for token_id in token_ids]
    expected = [flat[start : start + block_size] for start in range(0, len(flat) - block_size + 1, block_size)]
    if expected:
        assert pack_blocks(documents, trained_tokenizer, block_size).tolist() == expected
    else:
        with pytest.raises(DataError):
            pack_blocks(documents, trained_tokenizer, block_size)


@given(documents=some_documents, block_size=st.integers(2, 9))
def test_windows_are_each_documents_own_tokens(trained_tokenizer, documents, block_size):
    windows = document_windows(documents, trained_tokenizer, block_size)
    for token_ids, pieces in zip(naive_token_ids(documents, trained_tokenizer), windows, strict=True):
        flat = [token_id for piece in pieces for token_id in piece.tolist()]
        dropped = len(token_ids) % block_size == 1
        assert flat == (token_ids[:-1] if dropped else token_ids)
        assert all(len(piece) == block_size for piece in pieces[:-1])
        assert all(2 <= len(piece) <= block_size for piece in pieces)


@given(documents=some_documents)
def test_a_stream_is_the_concatenated_documents(trained_tokenizer, documents):
    flat = [token_id for token_ids in naive_token_ids(documents, trained_tokenizer) for token_id in token_ids]
    assert token_stream(documents, trained_tokenizer).tolist() == flat
    assert len(token_stream([], trained_tokenizer)) == 0


def test_a_text_of_words_has_one_end_for_each_line_and_none_more():
    """WikiText's own code counts the words of a line and one end, for blank lines too."""
    documents = as_documents([" = Title = \n \n", "one two\n", "no end of line"])
    tokenizer = train_tokenizer(documents, 300, "words")
    lines = "".join(document.text for document in documents).split("\n")
    expected = [word for line in lines for word in (*line.split(), "<eos>")]
    assert tokenizer.convert_ids_to_tokens(token_stream(documents, tokenizer).tolist()) == expected


def test_more_documents_than_one_batch_keep_their_order(tokenizer, monkeypatch):
    documents = as_documents(f"document {index}" for index in range(50))
    whole = pack_blocks(documents, tokenizer, 4)
    monkeypatch.setattr(blocks, "_BATCH", 7)
    assert torch.equal(pack_blocks(documents, tokenizer, 4), whole)
    assert len(document_windows(documents, tokenizer, 4)) == 50


def test_blocks_are_int64_of_the_asked_shape(tokenizer, small):
    packed = pack_blocks(small.train, tokenizer, 64)
    assert packed.dtype == torch.int64
    assert packed.shape[1] == 64
    assert packed.shape[0] == sum(map(len, naive_token_ids(small.train, tokenizer))) // 64
    assert set(packed.unique().tolist()) <= set(tokenizer.get_vocab().values())


def test_document_without_text_has_no_windows_but_keeps_its_place(tokenizer):
    windows = document_windows(as_documents(["", "some text", ""]), tokenizer, 64)
    assert [len(pieces) for pieces in windows] == [0, 1, 0]


def test_text_longer_than_the_tokenizers_limit_is_neither_cut_nor_warned_of(tokenizer, caplog):
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", model_max_length=8
    )
    documents = as_documents(["many words " * 50])
    packed = pack_blocks(documents, tokenizer, 16)
    assert packed.numel() > 64
    assert "longer than" not in caplog.text


def test_special_tokens_that_a_tokenizer_would_add_are_not(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    adding = type(tokenizer)(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert adding("some text")["input_ids"][0] == tokenizer.pad_token_id
    documents = as_documents(["some text", "more text"])
    assert torch.equal(pack_blocks(documents, adding, 4), pack_blocks(documents, tokenizer, 4))


def test_too_little_text_says_how_many_tokens_there_are(tokenizer):
    documents = as_documents(["ab", "c"])
    num_tokens = sum(map(len, naive_token_ids(documents, tokenizer)))
    with pytest.raises(
        DataError, match=rf"2 documents have {num_tokens} tokens, less than one block of 1,024; give more"
    ):
        pack_blocks(documents, tokenizer, 1024)


@pytest.mark.parametrize("block_size", [1, 0, -4])
def test_blocks_with_nothing_to_predict_are_refused(tokenizer, block_size):
    for function in (pack_blocks, document_windows):
        with pytest.raises(ConfigError, match=f"block_size must be 2 or more.*got {block_size}"):
            function(as_documents(["some text"]), tokenizer, block_size)


def test_tokenizer_without_end_of_text_is_refused(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="no end-of-text token; set its `eos_token`"):
        pack_blocks(as_documents(["some text"]), bare, 4)


def test_data_set_gives_inputs_and_labels_that_do_not_share_memory():
    data = BlockDataset(torch.arange(12).view(3, 4))
    assert len(data) == 3
    item = data[1]
    assert item.keys() == {"input_ids", "labels"}
    assert item["input_ids"].tolist() == item["labels"].tolist() == [4, 5, 6, 7]
    item["labels"].fill_(-100)
    assert data[1]["input_ids"].tolist() == [4, 5, 6, 7]


def test_data_set_can_be_batched_and_iterated():
    data = BlockDataset(torch.arange(12).view(3, 4))
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == data.blocks.tolist()
    assert sum(1 for _ in data) == 3
