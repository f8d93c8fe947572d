"""Documents of a small grammar, and tiny checkpoints that may have learned it."""

import random

import torch

from symphony_hf.data.documents import Document

NOUNS = ["orchestra", "symphony", "harbour", "tower", "river", "engine", "garden", "library", "violin", "mountain"]
VERBS = ["plays", "builds", "crosses", "watches", "carries", "paints", "follows", "measures", "opens", "remembers"]


def make_documents(number=14, seed=0):
    """Sentences of a small grammar, on lines of various lengths: something that a tiny model can learn."""
    rng = random.Random(seed)
    documents = []
    for index in range(number):
        lines = []
        for _ in range(rng.randrange(4, 9)):
            sentences = [
                f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the old {rng.choice(NOUNS)} ."
                for _ in range(rng.randrange(1, 5))
            ]
            lines.append(" ".join(sentences))
        documents.append(Document(f"document {index}", "\n".join(lines) + "\n"))
    return documents


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(model, tokenizer, documents, steps):
    """Something better than chance, in a second."""
    rows = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    flat = torch.tensor([token for row in rows for token in row])
    blocks = flat[: len(flat) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        ids = blocks[step * 8 % (len(blocks) - 8) :][:8]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
