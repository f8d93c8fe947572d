"""Corpora from tables and from data sets of the Hub, the Hub replaced by data sets in memory."""

import json

import datasets
import pytest

from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.files import entries_by_split
from symphony_hf.errors import DataError

ROWS = [f"Row {index} has some text." for index in range(200)]


@pytest.fixture(autouse=True)
def _no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch):
    """Stand in for data sets of the Hub by (name, configuration). An exception among them is raised."""
    offered = {}

    def load_dataset(name, config=None):
        if isinstance(offered[name, config], Exception):
            raise offered[name, config]
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict(columns) for split, columns in offered[name, config].items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return offered


def texts(documents):
    return [document.text for document in documents]


def write_table(path):
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps({"id": index, "body": row}) + "\n" for index, row in enumerate(ROWS)))
    else:
        table = datasets.Dataset.from_dict({"id": list(range(len(ROWS))), "body": ROWS})
        table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_table_gives_one_document_per_row(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    write_table(path)
    corpus = load_corpus(str(path), text_column="body")
    documents = corpus.train + corpus.validation + corpus.test
    assert sorted(texts(documents)) == sorted(ROWS)
    assert {document.name: document.text for document in documents}[f"table{suffix}[17]"] == ROWS[17]


def test_tables_named_for_splits_make_a_corpus(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"To {split}."}))
    corpus = load_corpus(str(tmp_path))
    assert texts(corpus.train + corpus.validation + corpus.test) == ["To train.", "To valid.", "To test."]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, {"train": ["train-0", "train-1", "training-2"], "validation": ["dev", "validation"], "test": ["test"]}),
        (
            {"validation_b": "validation", "validation_a": "validation"},
            {"train": ["train-0", "train-1", "training-2"], "validation": ["validation_b-0", "validation_b-1"]},
        ),
    ],
    ids=["all of a split", "first of the caller's"],
)
def test_entries_of_a_split_are_all_read_unless_the_caller_has_names_of_its_own(names, expected, tmp_path):
    found = ("train-0", "train-1", "training-2", "validation", "dev", "test")
    for name in (*found, "validation_a", "validation_b-0", "validation_b-1"):
        (tmp_path / f"{name}.txt").write_text(name)
    splits = entries_by_split(tmp_path, names)
    assert {split: [path.stem for path in paths] for split, paths in splits.items()} == {"test": ["test"], **expected}


def test_unreadable_table_is_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match=r"broken\.jsonl: not a readable \.jsonl table \(JSON parse error"):
        load_corpus(str(tmp_path / "broken.jsonl"))


def test_unknown_column_of_a_table_names_the_nearest(tmp_path):
    write_table(tmp_path / "table.csv")
    with pytest.raises(DataError, match=r"table\.csv: no column `boddy` \(text_column\).*did you mean `body`\?"):
        load_corpus(str(tmp_path / "table.csv"), text_column="boddy")


def test_hub_splits_are_kept_and_blank_rows_left_out(hub):
    hub["owner/name", "small"] = {
        "train": {"text": ["a", "", None, "b"]},
        "validation": {"text": ["c"]},
        "test": {"text": [" \n", "d"]},
        "unsupervised": {"text": ["e"]},
    }
    corpus = load_corpus("owner/name:small")
    assert [texts(corpus.train), texts(corpus.validation), texts(corpus.test)] == [["a", "b"], ["c"], ["d"]]
    assert [document.name for document in corpus.train] == ["train[0]", "train[3]"]
    assert corpus.source == "owner/name:small"


def test_rows_that_are_lines_are_one_text_with_its_blank_lines(hub, tmp_path):
    """The Hub has WikiText with a row per line, whose end some versions omit. It is cut as the same text in a file."""
    lines = [f" line {index} of an article" if index % 7 else "" for index in range(300)]
    text = "".join(f"{line}\n" for line in lines)
    ended = {split: {"text": [f"{line}\n" if line else "" for line in lines]} for split in ("train", "test")}
    hub["ended", None] = {**ended, "validation": {"text": lines}}
    (tmp_path / "folder").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "folder" / f"{split}.txt").write_text(text)
    of_file, of_rows = load_corpus(str(tmp_path / "folder")), load_corpus("ended", lines=True)
    for split in ("train", "validation", "test"):
        assert texts(getattr(of_rows, split)) == texts(getattr(of_file, split))
        assert "".join(texts(getattr(of_rows, split))) == text
        assert len(getattr(of_rows, split)) > 2


def test_rows_of_a_table_may_be_lines(tmp_path):
    lines = [f" line {index} of an article" if index % 7 else "" for index in range(3000)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines))
    cut, text = load_corpus(str(tmp_path / "table.jsonl"), lines=True), load_corpus(str(tmp_path / "text.txt"))
    for split in ("train", "validation", "test"):
        assert texts(getattr(cut, split)) == texts(getattr(text, split))


def test_hub_splits_that_are_missing_are_cut_by_each_rows_text(hub):
    hub["plain", None] = {"train": {"text": ROWS}}
    hub["shuffled", None] = {"train": {"text": ROWS[::-1] + ROWS[:50]}}
    plain, shuffled = load_corpus("plain"), load_corpus("shuffled")
    for split in ("train", "validation", "test"):
        assert set(texts(getattr(plain, split))) == set(texts(getattr(shuffled, split)))
    assert sorted(texts(plain.train + plain.validation + plain.test)) == sorted(ROWS)
    assert len(plain.train) > 0.85 * len(ROWS)


def test_only_the_missing_hub_split_is_cut(hub):
    hub["owner/name", None] = {"train": {"text": ROWS}, "test": {"text": ["To test."]}}
    corpus = load_corpus("owner/name")
    assert texts(corpus.test) == ["To test."]
    assert sorted(texts(corpus.train + corpus.validation)) == sorted(ROWS)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'owner/name' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
        datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset"),
        ValueError("BuilderConfig 'x' not found. Available: ['a']"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_data_set_that_cannot_be_loaded_is_neither_file_nor_data_set(hub, error):
    hub["owner/name", None] = error
    with pytest.raises(DataError) as raised:
        load_corpus("owner/name")
    for part in ("`owner/name`: no such file or folder", "not a data set that can be reached", str(error)):
        assert part in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("path", ["missing.txt", "/none/at/all", "a/b/c", "folder/missing.JSONL", "../up", ""])
def test_missing_file_is_not_looked_for_on_the_hub(hub, path):
    with pytest.raises(DataError, match=r"no such file or folder, and not the name of a reachable data set"):
        load_corpus(path)


def test_data_set_without_train_split_lists_its_splits(hub):
    hub["owner/name", None] = {"test": {"text": ROWS}, "extra": {"text": ROWS}}
    with pytest.raises(DataError, match="owner/name: no train split; its splits are test, extra"):
        load_corpus("owner/name")


def test_empty_hub_split_is_an_error(hub):
    hub["owner/name", None] = {"train": {"text": ROWS}, "validation": {"text": [""]}, "test": {"text": ["d"]}}
    with pytest.raises(DataError, match="owner/name: the validation split has no text"):
        load_corpus("owner/name")


def test_unknown_hub_column_names_the_nearest(hub):
    hub["owner/name", None] = {"train": {"sentence": ROWS, "label": [0] * len(ROWS)}}
    with pytest.raises(DataError, match=r"owner/name, train split: no column `sentences`.*did you mean `sentence`"):
        load_corpus("owner/name", text_column="sentences")


def test_column_that_is_not_text_is_an_error(hub):
    hub["owner/name", None] = {"train": {"sentence": ROWS, "label": [0] * len(ROWS)}}
    with pytest.raises(DataError, match=r"row 0 of column `label` .* is int, not text"):
        load_corpus("owner/name", text_column="label")
