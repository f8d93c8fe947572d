"""Documents in two folders, a tokenizer of whole words, and two checkpoints of a tiny model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "robustness"))  # so that tests can `import grammar`

import pytest
from grammar import make_documents, save, train
from models import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from symphony_hf.data.documents import split_of


@pytest.fixture(scope="session")
def texts():
    """Documents in two folders by sorted path, some in each split."""
    names = [f"{folder}/{number:03}.txt" for folder in "ab" for number in range(200)]
    by_split = {split: [name for name in names if split_of(name) == split] for split in ("validation", "test")}
    chosen = sorted(names[:6] + names[200:206] + [own[0] for own in by_split.values()])
    assert len(set(chosen)) == 14
    return {name: document.text for name, document in zip(chosen, make_documents(14), strict=True)}


@pytest.fixture(scope="session")
def data(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


@pytest.fixture(scope="session")
def words(texts):
    """Each word is one token, so which tokens an attack touched is known."""
    found = sorted({word for text in texts.values() for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", "AAA", *found])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, words):
    """The folders of a model before it was trained and after."""
    model = make_model("olmoe", vocab_size=len(words), max_position_embeddings=128)
    early = save(tmp_path_factory.mktemp("early"), model, words)
    return early, save(tmp_path_factory.mktemp("late"), train(model, words, make_documents(40, seed=1), 20), words)
