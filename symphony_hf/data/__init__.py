"""From files and data sets of the Hub to batches of text, conversations, questions and images."""

from symphony_hf.data.images.collator import VisualCollator, VisualConversations
from symphony_hf.data.images.questions import VisualQuestions

from .blocks import BlockDataset, document_windows, pack_blocks, token_stream
from .corpus import corpus_of, load_corpus
from .documents import Corpus, Document
from .embedded import embedded_corpus
from .glue import LabelledQuestions
from .packing import check_packing
from .prepare import prepare_data
from .prepared import PreparedData, check_lengths
from .questions import Question
from .splits import PreparedSplit, prepare_split
from .streams import sample_stream
from .tokenizer import cached_tokenizer, train_tokenizer

__all__ = [
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
]
