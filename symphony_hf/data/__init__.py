"""Data: corpora, their tokenizer, their blocks, and their corruption; conversations, questions and images."""

from .blocks import BlockDataset, document_windows, pack_blocks
from .corpus import Corpus, Document, embedded_corpus, load_corpus
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
from .visual import VisualCollator, VisualConversations, VisualPrompt, VisualQuestions

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
    "VisualPrompt",
    "VisualQuestions",
    "attack",
    "cached_tokenizer",
    "check_lengths",
    "check_packing",
    "document_windows",
    "embedded_corpus",
    "load_corpus",
    "pack_blocks",
    "prepare_data",
    "prepare_split",
    "sample_stream",
    "train_tokenizer",
    "word_swap",
    "words_changed",
]
