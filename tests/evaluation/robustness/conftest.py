"""Tiny checkpoints with tokenizers, and documents that they are evaluated on."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import grammar`

import pytest
from grammar import make_documents, save, train
from models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from symphony_hf.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(scope="session")
def data_file(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def tokenizer(documents):
    """Byte-level BPE, so that an attack moves tokens."""
    return train_tokenizer(documents, 300)


@pytest.fixture(scope="session")
def word_tokenizer(documents):
    """Each word is one token, unknown ones too: so which tokens an attack touched is known."""
    words = sorted({word for document in documents for word in document.text.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", "AAA", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tokenizer):
    """A checkpoint that has learned the grammar, from other documents than those it is measured on."""
    model = make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=128)
    model = train(model, tokenizer, make_documents(40, seed=1), steps=30)
    return save(tmp_path_factory.mktemp("trained"), model, tokenizer)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, tokenizer):
    model = make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=128)
    return save(tmp_path_factory.mktemp("untrained"), model, tokenizer)
