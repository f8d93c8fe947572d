"""Data: corpora, their tokenizer, their blocks, and their corruption; conversations, questions and images."""

from .blocks import BlockDataset, document_windows, pack_blocks, token_stream
from .corpus import Corpus, Document, corpus_of, embedded_corpus, load_corpus
from .corruption import STOP_WORDS, attack, word_swap, words_changed
from .glue import LabelledQuestions
from .lengths import check_lengths
from .packing import check_packing
from .prepare import prepare_data
from .prepared import PreparedData
from .questions import Question
from .splits import PreparedSplit, prepare_split
from .streams import sample_stream
from .tokenizer import cached_tokenizer, train_tokenizer
from .visual import VisualCollator, VisualConversations, VisualQuestions

__all__ = [
    "STOP_WORDS",
    "BlockDataset",
    "Corpus",
    "Document",
    "LabelledQuestions",
    "PreparedData",
    "PreparedSplit",
    "Question",
    "VisualCollator",
    "VisualConversations",
    "VisualQuestions",
    "attack",
    "cached_tokenizer",
    "check_lengths",
    "check_packing",
    "corpus_of",
    "document_windows",
    "embedded_corpus",
    "load_corpus",
    "pack_blocks",
    "prepare_data",
    "prepare_split",
    "sample_stream",
    "token_stream",
    "train_tokenizer",
    "word_swap",
    "words_changed",
]
