"""The embedded corpus, and corpora from files and folders."""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from symphony_hf.data import embedded as embedded_module
from symphony_hf.data.corpus import load_corpus
from symphony_hf.errors import DataError, SymphonyWarning

SPLITS = ("train", "validation", "test")


def all_documents(corpus):
    return corpus.train + corpus.validation + corpus.test


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return str(folder)


def piece_number(document):
    return int(document.name.split("[")[1].rstrip("]"))


def paragraphs(num):
    return "\n\n".join(f"Paragraph {index}. " + "Some words of prose. " * 30 for index in range(num)) + "\n"


# The embedded corpus


def test_embedded_documents_are_the_files_they_name(embedded):
    root = Path(sysconfig.get_path("stdlib"))
    for document in embedded.validation + embedded.test:
        assert document.text == (root / document.name).read_text(encoding="utf-8")


def test_embedded_corpus_is_large_enough_and_split_roughly_90_5_5(embedded):
    sizes = [len(getattr(embedded, split)) for split in SPLITS]
    assert sum(len(document.text) for document in embedded.train) > 3_000_000
    assert 0.85 < sizes[0] / sum(sizes) < 0.95
    assert min(sizes) >= 0.02 * sum(sizes)


def test_embedded_splits_share_no_file_and_no_text(embedded):
    documents = all_documents(embedded)
    assert len({document.name for document in documents}) == len(documents)
    assert len({document.text for document in documents}) == len(documents)


def test_embedded_corpus_has_no_tests_packages_or_tables(embedded):
    for document in all_documents(embedded):
        folders = set(Path(document.name).parts[:-1])
        assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"}
        assert not document.name.startswith("_sysconfigdata")
        assert 500 <= len(document.text) <= 200_000


def test_embedded_split_is_the_hash_of_the_path(embedded):
    for split in SPLITS:
        for document in getattr(embedded, split):
            bucket = int(hashlib.sha256(document.name.encode()).hexdigest()[:16], 16) % 20
            assert split == {0: "validation", 1: "test"}.get(bucket, "train")


def test_embedded_corpus_is_sorted_and_the_same_twice(embedded):
    assert load_corpus(None) == embedded
    for split in SPLITS:
        names = [document.name for document in getattr(embedded, split)]
        assert names == sorted(names)


def test_embedded_corpus_keeps_the_first_of_identical_files(monkeypatch, tmp_path):
    texts = {f"{index:03}.py": f"# {index}\n" + "text = 'words'\n" * 1_000 for index in range(100)}
    write(tmp_path, texts | {"copy.py": texts["007.py"], "tests/new.py": "# new\n" + "x = 1\n" * 200})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(document.name for document in all_documents(load_corpus(None))) == sorted(texts)


def test_python_without_sources_is_an_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=rf"{tmp_path}.*found 0; give `data.path` in a recipe, or `--data`: a text"):
        load_corpus(None)


def test_python_without_docstrings_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(embedded_module, "_public_objects", lambda: [])
    with pytest.raises(DataError, match=r"run without -OO, or give `data.path` in a recipe, or `--data`"):
        embedded_module.described_names()


# One file


@pytest.mark.parametrize("name", ["prose.txt", "prose.md", "wiki.tokens", "no_suffix"])
def test_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, name):
    text = paragraphs(400)
    write(tmp_path, {name: text})
    corpus = load_corpus(str(tmp_path / name))
    documents = sorted(all_documents(corpus), key=piece_number)
    assert "".join(document.text for document in documents) == text
    assert all(document.text.startswith("Paragraph") for document in documents)
    assert all(2_000 <= len(document.text) < 3_000 for document in documents[:-1])


def test_file_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = "".join(f"{index} words in a line\n" for index in range(60_000))
    write(tmp_path, {"lines.txt": text})
    documents = all_documents(load_corpus(str(tmp_path / "lines.txt")))
    assert sum(len(document.text) for document in documents) == len(text)
    assert all(document.text.endswith("line\n") and len(document.text) < 9_000 for document in documents)


def test_a_piece_stays_in_its_split_when_text_is_added_elsewhere(tmp_path):
    write(tmp_path, {"before.txt": paragraphs(400), "after.txt": paragraphs(800)})
    before, after = (load_corpus(str(tmp_path / name)) for name in ("before.txt", "after.txt"))
    # The shorter file's last piece goes on in the longer file, so it is another one there.
    last = max(all_documents(before), key=piece_number)
    for split in SPLITS:
        later = {document.text for document in getattr(after, split)}
        assert {document.text for document in getattr(before, split) if document != last} <= later


def test_equal_pieces_are_never_on_both_sides_of_a_split(tmp_path):
    boilerplate = "The same long notice. " * 100 + "\n\n"
    write(tmp_path, {"notices.txt": paragraphs(400) + "\n" + boilerplate * 40})
    corpus = load_corpus(str(tmp_path / "notices.txt"))
    holders = [split for split in SPLITS if any(d.text == boilerplate for d in getattr(corpus, split))]
    assert len(holders) == 1


def test_too_short_a_file_names_the_empty_split(tmp_path):
    write(tmp_path, {"short.txt": "Only one paragraph."})
    with pytest.raises(DataError, match=r"short\.txt: the \w+ split has no text .*give more documents"):
        load_corpus(str(tmp_path / "short.txt"))


def test_empty_file_is_an_error(tmp_path):
    write(tmp_path, {"empty.txt": " \n\n"})
    with pytest.raises(DataError, match="0 train, 0 validation, 0 test"):
        load_corpus(str(tmp_path / "empty.txt"))


def test_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        load_corpus(str(tmp_path / "latin.txt"))


# A folder


def test_folder_has_one_document_per_text_file_at_any_depth(tmp_path):
    files = {f"chapter{index % 3}/{index}.txt": f"Text {index}." for index in range(200)}
    left_out = {"picture.bin": "x", ".hidden/a.txt": "hidden", "blank.txt": "  \n"}
    corpus = load_corpus(write(tmp_path, files | left_out))
    assert {document.name: document.text for document in all_documents(corpus)} == files


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_whose_name_is_not_utf8_is_read(tmp_path):
    write(tmp_path, {f"{index}.txt": f"Text {index}." for index in range(200)})
    odd_name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / odd_name).write_text("Coffee.")
    assert {document.name: document.text for document in all_documents(load_corpus(str(tmp_path)))}[
        odd_name
    ] == "Coffee."


def test_file_of_a_folder_stays_in_its_split_when_it_is_edited_or_joined(tmp_path):
    files = {f"{index}.txt": f"Text {index}." for index in range(200)}
    before = load_corpus(write(tmp_path, files))
    after = load_corpus(
        write(tmp_path, {name: text + " Edited." for name, text in files.items()} | {"new.txt": "New."})
    )
    for split in SPLITS:
        names = [document.name for document in getattr(after, split) if document.name != "new.txt"]
        assert names == [document.name for document in getattr(before, split)]


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "validation.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("train/a.txt", "dev/deep/a.txt", "test/a.md"),
    ],
)
def test_folder_with_splits_of_its_own_keeps_them(tmp_path, names):
    texts = dict(zip(names, ("To train.", "To validate.", "To test."), strict=True))
    corpus = load_corpus(write(tmp_path, texts | {"README.md": "About this data."}))
    assert [[document.text for document in getattr(corpus, split)] for split in SPLITS] == [
        ["To train."],
        ["To validate."],
        ["To test."],
    ]


def test_split_that_a_folder_lacks_is_cut_from_its_train_split(tmp_path):
    corpus = load_corpus(write(tmp_path, {"train.txt": paragraphs(600), "test.txt": "To test."}))
    assert [document.text for document in corpus.test] == ["To test."]
    assert 0 < len(corpus.validation) < 0.15 * len(corpus.train)
    pieces = corpus.train + corpus.validation
    assert sum(len(document.text) for document in pieces) == len(paragraphs(600))


def test_project_with_a_training_script_and_tests_is_no_split_folder(tmp_path):
    sources = {f"module{index}.py": f"x = {index}\n" for index in range(200)}
    files = sources | {"train.py": "main()\n", "tests/test_main.py": "assert True\n", "test/data.txt": "data"}
    corpus = load_corpus(write(tmp_path, files))
    assert {document.name for document in all_documents(corpus)} == files.keys()


def test_one_file_that_happens_to_be_called_train_is_no_split(tmp_path):
    files = {f"vehicle{index}.txt": f"Vehicle {index}." for index in range(200)} | {"train.txt": "On rails."}
    corpus = load_corpus(write(tmp_path, files))
    assert {document.name for document in all_documents(corpus)} == files.keys()


def test_folder_without_text_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no text files in this folder; looked for \.md, \.py"):
        load_corpus(write(tmp_path, {"picture.bin": "x"}))


def test_file_of_a_folder_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, {"fine.txt": "Fine."})
    (tmp_path / "latin.txt").write_bytes("Füße".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        load_corpus(str(tmp_path))


def rows(split, number=3):
    return "".join(f'{{"text": "{split} row {index}"}}\n' for index in range(number))


def test_tables_in_the_subfolder_of_a_split_are_read(tmp_path):
    files = {f"{split}/part-{part}.jsonl": rows(f"{split} {part}") for split in SPLITS for part in (0, 1)}
    corpus = load_corpus(write(tmp_path, files | {"README.md": "About this data."}))
    for split in SPLITS:
        found = {document.name: document.text for document in getattr(corpus, split)}
        assert found == {
            f"{split}/part-{part}.jsonl[{row}]": f"{split} {part} row {row}" for part in (0, 1) for row in range(3)
        }


@pytest.mark.parametrize(
    ("texts", "tables"),
    [
        ([f"{index}.txt" for index in range(200)], ["deep/data.jsonl"]),
        ([f"{index}.md" for index in range(200)], ["a.csv", "deep/b.tsv", "package.json", "train.jsonl"]),
        ([f"{split}/a.txt" for split in SPLITS], [f"{split}/b.json" for split in SPLITS]),
        ([f"{split}/a.txt" for split in SPLITS], ["test/b.json"]),
    ],
)
def test_tables_among_text_files_are_left_out_with_one_warning(tmp_path, texts, tables):
    files = {name: f"Text of {name}." for name in texts} | {name: rows("any") for name in tables}
    with pytest.warns(SymphonyWarning) as caught:
        corpus = load_corpus(write(tmp_path, files))
    assert {document.name for document in all_documents(corpus)} == set(texts)
    (warning,) = caught
    number = "1 table" if len(tables) == 1 else f"{len(tables)} tables"
    assert f"{number} among its text files left out, such as `{tables[0]}`" in str(warning.message)


@pytest.mark.parametrize("names", [["data.csv"], ["train.jsonl", "deep/more.jsonl"]])
def test_a_folder_of_tables_that_are_not_read_is_an_error(tmp_path, names):
    files = {name: rows("any") for name in names}
    with pytest.raises(
        DataError, match=rf"no text file in this folder, and `{min(names)}` is a table .*give the table"
    ):
        load_corpus(write(tmp_path, files))


def test_hidden_tables_are_ignored(tmp_path):
    files = {f"{index}.txt": f"Text {index}." for index in range(200)}
    corpus = load_corpus(write(tmp_path, files | {".cache/data.jsonl": rows("any")}))
    assert {document.name for document in all_documents(corpus)} == files.keys()
