"""Tiny checkpoints with a tokenizer, and documents in splits of their own."""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import naive_experts`

import pytest
from models import make_model, move_graphs

from symphony_hf import symphonize
from symphony_hf.data.documents import Document
from symphony_hf.data.tokenizer import train_tokenizer

WORDS = ["orchestra", "harbour", "tower", "river", "plays", "builds", "crosses", "paints", "the", "old", "new", "near"]


def make_documents(number, seed):
    rng = random.Random(seed)
    texts = ["\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.randrange(3, 7))) for _ in range(number)]
    return [Document(f"{seed}-{place}", text) for place, text in enumerate(texts)]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, number, seed in (("train", 20, 0), ("validation", 3, 1), ("test", 12, 2)):
        rows = (json.dumps({"text": document.text}) + "\n" for document in make_documents(number, seed))
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(make_documents(20, 0), 300)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """Return a function of a name and a model that saves both model and tokenizer, and returns the folder."""

    def save(name, model):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def plain(checkpoint, tokenizer):
    return checkpoint("plain", make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=64))


@pytest.fixture(scope="session")
def symphony(checkpoint, tokenizer):
    model = make_model("olmoe", vocab_size=len(tokenizer), max_position_embeddings=64)
    return checkpoint("symphony", move_graphs(symphonize(model)))
