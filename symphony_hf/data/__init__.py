"""Data: corpora, their tokenizer, their blocks, and their corruption."""

from .blocks import BlockDataset, document_windows, pack_blocks
from .corpus import Corpus, Document, embedded_corpus, load_corpus
from .corruption import STOP_WORDS, attack, word_swap, words_changed
from .tokenizer import cached_tokenizer, train_tokenizer

__all__ = [
    "STOP_WORDS",
    "BlockDataset",
    "Corpus",
    "Document",
    "attack",
    "cached_tokenizer",
    "document_windows",
    "embedded_corpus",
    "load_corpus",
    "pack_blocks",
    "train_tokenizer",
    "word_swap",
    "words_changed",
]
