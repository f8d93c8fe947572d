"""Text that the tokenizer of a built model is trained on: that of the rows that the model will read."""

from pathlib import Path
from typing import TYPE_CHECKING

from symphony_hf.data.images.llava import read_llava

from .chat import read_conversations
from .chat_template import plain_text
from .corpus import corpus_of
from .documents import Corpus, Document
from .embedded import embedded_corpus
from .glue import is_embedded, read_glue
from .rows import PROBLEM, thin_rows
from .streams import sample_stream

if TYPE_CHECKING:
    from symphony_hf.recipe import DataSection


def tokenizer_corpus(section: "DataSection") -> Corpus:
    """Read the text of the train split, to train a tokenizer on.

    Args:
        section: Data section of a recipe.

    Returns:
        A corpus whose train split has the documents of `text` (the first ones of a stream), the conversations of
        `chat` and `llava`, or the prompts and right answers of `glue`; of rows, `limit` at most. For data that needs no
        download, it has the source files of the running Python's standard library.

    Raises:
        DataError: If the data is missing or unreadable, or not in the form that the kind needs.
    """
    if is_embedded(section.kind, section.path):
        return embedded_corpus()
    if section.kind == "text":
        return sample_stream(section) if section.streaming else corpus_of(section)
    if section.kind == "glue":
        return _as_corpus(_questions(section), section)
    return _as_corpus(read_conversations(section) if section.kind == "chat" else _visual(section), section)


def _as_corpus(texts: list[str], section: "DataSection") -> Corpus:
    documents = [Document(f"train[{number}]", text) for number, text in enumerate(texts)]
    return Corpus(documents, [], [], section.path or section.kind)


def _questions(section: "DataSection") -> list[str]:
    assert section.name is not None
    task, rows = read_glue(section.path, section.name, section.revision, [])
    table = thin_rows(rows.splits["train"], section.limit)
    return [f"{task.prompt.format(**row)} {task.answers[row['answer']]}" for row in table]


def _visual(section: "DataSection") -> list[str]:
    assert section.path is not None
    images = None if section.images is None else Path(section.images).expanduser()
    rows = thin_rows(read_llava(Path(section.path).expanduser(), images).splits["train"], section.limit)
    return [plain_text(row["messages"]) for row in rows.remove_columns("images") if not row[PROBLEM]]
