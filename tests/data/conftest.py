"""A small slice of the embedded corpus, and a small tokenizer trained on it."""

import copy

import pytest

from symphony_hf.data.documents import Corpus
from symphony_hf.data.tokenizer import train_tokenizer

VOCAB_SIZE = 512


@pytest.fixture(scope="session")
def small(embedded):
    return Corpus(train=embedded.train[:12], validation=embedded.validation[:2], test=embedded.test[:2], source="small")


@pytest.fixture(scope="session")
def trained_tokenizer(small):
    return train_tokenizer(small.train, VOCAB_SIZE)


@pytest.fixture
def tokenizer(trained_tokenizer):
    """Return a copy, which `prepare_data` gives a chat template."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """Give each test its own cache of `datasets`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
