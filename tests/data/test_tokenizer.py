"""Training the tokenizer, and keeping it."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from symphony_hf.data import tokenizer as tokenizer_module
from symphony_hf.data.chat_template import CHAT_TEMPLATE
from symphony_hf.data.documents import Corpus, Document
from symphony_hf.data.tokenizer import cached_tokenizer, special_ids, train_tokenizer
from symphony_hf.data.tokenizer_text import tokenizer_corpus
from symphony_hf.errors import ConfigError, SymphonyWarning
from symphony_hf.recipe import DataSection

VOCAB_SIZE = 300


@pytest.fixture
def no_training(monkeypatch):
    def fail(texts, vocab_size):
        raise AssertionError("trained again")

    return lambda: monkeypatch.setattr(tokenizer_module, "_train", fail)


def entry_of(cache_dir):
    (entry,) = (cache_dir / "tokenizers").iterdir()
    return entry


@given(text=st.text(max_size=200))
def test_any_text_decodes_to_itself(trained_tokenizer, text):
    token_ids = trained_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained_tokenizer.decode(token_ids) == text


@pytest.mark.parametrize(
    "text", ["", " leading", "tabs\t\tand  spaces \n\n", "it 's n't . ,", "naïve 数 🎼\u200b", "\r\n\x00"]
)
def test_awkward_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_vocabulary_has_the_asked_size_and_the_special_tokens_first(tokenizer, small):
    assert len(tokenizer) == 512
    assert len(train_tokenizer(small.train, VOCAB_SIZE)) == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 1)


def test_tokens_are_learned_from_the_texts(tokenizer, small):
    text = small.train[0].text
    assert len(tokenizer(text)["input_ids"]) < 0.6 * len(text.encode())


def test_training_is_deterministic(small):
    first, second = (train_tokenizer(small.train, VOCAB_SIZE) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_training_is_silent_where_there_is_no_terminal(small, capfd):
    train_tokenizer(small.train, VOCAB_SIZE)
    assert capfd.readouterr() == ("", "")


def test_saved_with_a_model_it_loads_as_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'é' . , n't"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("vocab_size", [257, 0, -1])
def test_vocabulary_without_room_for_the_bytes_is_refused(vocab_size):
    with pytest.raises(ConfigError, match=f"vocab_size must be 258 or more .*; got {vocab_size}"):
        train_tokenizer([Document("a", "a")], vocab_size)


def test_second_call_loads_what_the_first_trained(small, tmp_path, no_training):
    trained = cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    no_training()
    loaded = cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.special_tokens_map == trained.special_tokens_map
    assert loaded(small.test[0].text)["input_ids"] == trained(small.test[0].text)["input_ids"]


def test_cache_holds_only_the_tokenizer_and_its_checksum(small, tmp_path):
    cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    assert sorted(os.listdir(entry_of(tmp_path))) == ["tokenizer.json", "tokenizer.json.sha256"]


def test_other_texts_or_sizes_are_other_entries(small, tmp_path):
    def with_train(*texts):
        train = [Document(str(index), text) for index, text in enumerate(texts)]
        return Corpus(train=train, validation=small.validation, test=small.test, source="")

    for corpus, vocab_size in (
        (with_train("ab", "c"), 300),
        (with_train("a", "bc"), 300),
        (with_train("ab", "c"), 301),
    ):
        cached_tokenizer(corpus, vocab_size, tmp_path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3


def test_texts_that_are_not_trained_on_do_not_matter(small, tmp_path, no_training):
    cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    no_training()
    other = Corpus(train=small.train, validation=[], test=[], source="other")
    assert len(cached_tokenizer(other, VOCAB_SIZE, tmp_path)) == VOCAB_SIZE


@pytest.mark.thorough
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\x00", None], ids=["empty", "json", "binary", "truncated"])
def test_damaged_entry_is_trained_again(small, tmp_path, no_training, damage):
    trained = cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    path = entry_of(tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.warns(SymphonyWarning, match="cached tokenizer is damaged"):
        assert cached_tokenizer(small, VOCAB_SIZE, tmp_path).get_vocab() == trained.get_vocab()
    no_training()
    assert cached_tokenizer(small, VOCAB_SIZE, tmp_path).get_vocab() == trained.get_vocab()


def test_half_written_entry_is_trained_again_without_a_word(small, tmp_path):
    trained = cached_tokenizer(small, VOCAB_SIZE, tmp_path)
    (entry_of(tmp_path) / "tokenizer.json.sha256").unlink()
    assert cached_tokenizer(small, VOCAB_SIZE, tmp_path).get_vocab() == trained.get_vocab()
    assert (entry_of(tmp_path) / "tokenizer.json.sha256").exists()


def test_two_that_race_both_succeed(small, tmp_path, no_training, monkeypatch):
    train = tokenizer_module._train

    def train_and_lose(texts, vocab_size):
        monkeypatch.setattr(tokenizer_module, "_train", train)
        cached_tokenizer(small, vocab_size, tmp_path)  # another process, done before us
        return train(texts, vocab_size)

    monkeypatch.setattr(tokenizer_module, "_train", train_and_lose)
    assert len(cached_tokenizer(small, VOCAB_SIZE, tmp_path)) == VOCAB_SIZE
    no_training()
    assert len(cached_tokenizer(small, VOCAB_SIZE, tmp_path)) == VOCAB_SIZE


def test_many_at_once_all_get_the_tokenizer_and_leave_nothing_behind(small, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tokenizers = list(pool.map(lambda _: cached_tokenizer(small, VOCAB_SIZE, tmp_path), range(16)))
    assert all(tokenizer.get_vocab() == tokenizers[0].get_vocab() for tokenizer in tokenizers)
    assert sorted(os.listdir(entry_of(tmp_path))) == ["tokenizer.json", "tokenizer.json.sha256"]


def test_cache_that_cannot_be_written_only_warns(small, tmp_path):
    (tmp_path / "tokenizers").write_text("a file where the folder should be")
    with pytest.warns(SymphonyWarning, match="could not be cached"):
        assert len(cached_tokenizer(small, VOCAB_SIZE, tmp_path)) == VOCAB_SIZE


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SYMPHONY_HF_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/symphony_hf"),
        ({}, ".cache/symphony_hf"),
    ],
)
def test_cache_folder_follows_the_environment(small, tmp_path, monkeypatch, variables, folder):
    for name in ("SYMPHONY_HF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    cached_tokenizer(small, VOCAB_SIZE)
    assert entry_of(tmp_path / folder).is_dir()


def test_words_are_what_whitespace_separates():
    texts = ["the cat <unk> the\ndog , the cat\n", "a dog\n"]
    tokenizer = train_tokenizer([Document(str(n), text) for n, text in enumerate(texts)], 7, "words")
    # By frequency: the 3, cat and dog 2, then the first of `,` and `a` in the alphabet.
    vocabulary = ["<eos>", "<unk>", "the", "cat", "dog", ",", "a"]
    assert [tokenizer.convert_ids_to_tokens(n) for n in range(len(tokenizer))] == vocabulary
    assert tokenizer(texts[0])["input_ids"] == [2, 3, 1, 2, 0, 4, 5, 2, 3, 0]
    assert tokenizer("no cat")["input_ids"] == [1, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0, 1)
    assert len(train_tokenizer([Document("0", texts[0])], 4, "words")) == 4


def test_words_are_kept_beside_pieces(tmp_path):
    corpus = Corpus([Document("0", "one two\n" * 50)], [], [], "texts")
    pieces, words = (cached_tokenizer(corpus, 300, tmp_path, kind) for kind in ("bpe", "words"))
    assert len(words) == 4
    assert len(pieces) > 256
    again = cached_tokenizer(corpus, 300, tmp_path, "words")
    assert again("two one\n")["input_ids"] == words("two one\n")["input_ids"] == [3, 2, 0]


@pytest.mark.parametrize("kind", ["bpe", "words", "characters"])
def test_special_tokens_are_known_before_training(small, kind):
    trained = train_tokenizer(small.train, VOCAB_SIZE, kind)
    assert special_ids(kind) == {name: getattr(trained, name) for name in special_ids(kind)}


TURNS = [("第一个问题是什么？", "答案是一。"), ("第二个问题是什么？", "答案是二。")]


def rows_of(kind):
    for number in range(60):
        question, answer = (f"{text}{number}" for text in TURNS[number % 2])
        if kind == "messages":
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        elif kind == "prompt":
            yield {"prompt": question, "completion": answer}
        elif kind == "glue":
            yield {"question": question, "sentence": answer, "label": number % 2}
        else:
            yield {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize("form", ["messages", "prompt", "glue", "llava"])
def test_a_tokenizer_is_trained_on_what_the_model_reads(tmp_path, form):
    """Not on another text, in whose vocabulary half of this one would be unknown."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(list(rows_of(form)), ensure_ascii=False))
    kind, name = (form, "qnli") if form == "glue" else ("llava" if form == "llava" else "chat", None)
    corpus = tokenizer_corpus(DataSection(kind=kind, name=name, path=str(path)))
    text = "\n".join(document.text for document in corpus.train)
    assert all(sentence in text for turn in TURNS for sentence in turn)
    assert ("Assistant: " in text) == (form in ("messages", "llava"))
    tokenizer = train_tokenizer(corpus.train, VOCAB_SIZE, "characters")
    assert tokenizer.unk_token_id not in tokenizer(TURNS[0][0] + TURNS[1][1])["input_ids"]


@pytest.mark.parametrize("form", ["messages", "prompt", "glue", "llava"])
def test_a_tokenizer_is_trained_on_no_more_rows_than_the_model(tmp_path, form):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(list(rows_of(form)), ensure_ascii=False))
    kind, name = (form, "qnli") if form == "glue" else ("llava" if form == "llava" else "chat", None)
    whole, limited = (
        [
            document.text
            for document in tokenizer_corpus(DataSection(kind=kind, name=name, path=str(path), **more)).train
        ]
        for more in ({}, {"limit": 5})
    )
    assert len(whole) > 40
    assert limited == [whole[number * len(whole) // 5] for number in range(5)]  # evenly spaced


@pytest.mark.parametrize("kind", ["chat", "llava"])
def test_conversations_are_the_text_of_the_plain_template(tmp_path, trained_tokenizer, kind):
    """But for the special tokens, which no text of a tokenizer has."""
    turns = [("user", " What is it?\n"), ("assistant", " A  number. "), ("user", "Which?")]
    names = {"user": "human", "assistant": "gpt"}
    conversations = [[*turns, ("assistant", f"{number} ")] for number in range(60)]
    path = tmp_path / "rows.json"
    rows = [[{"from": names[role], "value": text} for role, text in conversation] for conversation in conversations]
    path.write_text(json.dumps([{"conversations": row} for row in rows]))
    rendered = [
        trained_tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in conversation],
            chat_template=CHAT_TEMPLATE,
            tokenize=False,
        ).replace(trained_tokenizer.eos_token, "")
        for conversation in conversations
    ]
    found = [document.text for document in tokenizer_corpus(DataSection(kind=kind, path=str(path))).train]
    assert len(found) > 40
    assert set(found) <= set(rendered)


def test_the_digest_of_a_tokenizer_is_of_its_tokens(small):
    first, again, other = (
        tokenizer_module.digest_tokenizer(train_tokenizer(documents, VOCAB_SIZE))
        for documents in (small.train, small.train, [Document("0", "another text " * 50)])
    )
    assert first == again != other
    used = train_tokenizer(small.train, VOCAB_SIZE)
    used(["a", "a longer text"], padding=True, truncation=True, max_length=2)  # which its backend keeps
    assert tokenizer_module.digest_tokenizer(used) == first


@pytest.mark.parametrize("kind", ["text", "chat", "llava"])
def test_data_without_a_path_has_the_librarys_tokenizer(kind, embedded):
    assert tokenizer_corpus(DataSection(kind=kind)) == embedded
