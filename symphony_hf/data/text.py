"""Data of kind `text`: documents in blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_hf.settings import changed_settings

from .corpus import corpus_of
from .datasets import digest_texts
from .documents import SPLITS, Document
from .files import has_tables
from .packing import TokenBlocks
from .prepared import PreparedData
from .rows import thinned
from .streams import open_stream
from .token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import DataSection


OF_TABLES = ("text_column", "rows")
"""Settings of a data section of kind `text` that have no effect where there is no table."""


def may_read_tables(section: "DataSection") -> bool:
    """Return whether a data section of kind `text` has tables: on the Hub, or its file or a file of its folder."""
    if section.path is None:
        return False
    local = Path(section.path).expanduser()
    return has_tables(local) if local.exists() else True


def prepare_text(
    section: "DataSection", tokenizer: "PreTrainedTokenizerBase", seed: int, train: Mapping[str, Any]
) -> PreparedData:
    """Read documents, tokenize them (or find them tokenized), and cut them into blocks.

    Returns splits of blocks, and the test documents. The train split of a stream is iterable, in an order by the seed.
    A held-out split that does not fill a block is None, unless the train section of the recipe evaluates on it.

    Raises:
        DataError: If there is no such text, too little of it, or it cannot be streamed.
        ConfigError: If the tokenizer has no end-of-text token.
    """
    if section.streaming:
        return _prepare_stream(section, tokenizer, seed, train)
    corpus = corpus_of(section)
    documents = {split: list(thinned(getattr(corpus, split), section.limit)) for split in SPLITS}
    stores = {split: _store(documents[split], tokenizer) for split in SPLITS}
    blocks = TokenBlocks(stores["train"], section.block_size, section.packing, where=f"{corpus.source}, train split")
    return PreparedData(
        kind="text",
        train=blocks,
        validation=_validation_blocks(stores["validation"], section, train, corpus.source),
        test=_blocks_if_any(stores["test"], section),
        documents=documents["test"],
        revision=corpus.commit or digest_texts(document.text for split in SPLITS for document in documents[split]),
        num_tokens=len(blocks) * section.block_size,
        notes=[f"{corpus.source}: {_counted(documents)}", *_unused_settings(section)],
    )


def _unused_settings(section: "DataSection") -> list[str]:
    """Return notes on settings of tables that have no effect on text files."""
    given: dict[str, Any] = {} if may_read_tables(section) else changed_settings(section)
    return [
        f"data: `{name}: {given[name]}` has no effect: `{section.path}` has no table"
        for name in OF_TABLES
        if name in given
    ]


def _prepare_stream(
    section: "DataSection", tokenizer: "PreTrainedTokenizerBase", seed: int, train: Mapping[str, Any]
) -> PreparedData:
    stream = open_stream(section, tokenizer, seed)
    stores = {split: _store(documents, tokenizer) for split, documents in stream.held_out.items()}
    return PreparedData(
        kind="text",
        train=stream.blocks,
        validation=_validation_blocks(stores["validation"], section, train, str(section.path)),
        test=_blocks_if_any(stores["test"], section),
        documents=stream.held_out["test"],
        revision=stream.revision,
        notes=[f"{section.path}: read while training goes on; held out: {_counted(stream.held_out)}"],
    )


def _store(documents: list[Document], tokenizer: "PreTrainedTokenizerBase") -> TokenStore:
    return TokenStore([document.text for document in documents], tokenizer)


def _validation_blocks(
    store: TokenStore, section: "DataSection", train: Mapping[str, Any], source: str
) -> TokenBlocks | None:
    if train.get("eval_strategy") in (None, False, "no"):
        return _blocks_if_any(store, section)
    return TokenBlocks(store, section.block_size, section.packing, where=f"{source}, validation split")


def _blocks_if_any(store: TokenStore, section: "DataSection") -> TokenBlocks | None:
    """Return None if a split does not fill a block. The test split is measured per document."""
    if len(store) < section.block_size:
        return None
    return TokenBlocks(store, section.block_size, section.packing)


def _counted(documents: Mapping[str, list[Document]]) -> str:
    return ", ".join(f"{len(documents[split]):,} {split} documents" for split in documents)
