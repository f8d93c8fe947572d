"""`symphony prepare`: any local text becomes a split of a corpus."""

import random
import zipfile

import pytest
from typer.testing import CliRunner

from symphony_hf import files as unfinished
from symphony_hf.cli import app
from symphony_hf.data.corpus import load_corpus
from symphony_hf.data.files import read_file, read_folder
from symphony_hf.data.splits import prepare_split
from symphony_hf.errors import ConfigError, DataError, SymphonyWarning
from symphony_hf.files import UNFINISHED

TAGGED = "\n\n\tThe/at jury/nn said/vbd 1\\/2/cd ,/, //nil ./.\n\n\n\tA/at second/od one/nn\n"


@pytest.fixture
def tagged(tmp_path):
    archive = tmp_path / "tagged.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("corpus/ca01", TAGGED)
        file.writestr("corpus/deeper/cb02", "Words/nns\n")
        file.writestr("corpus/README", "about/in it/pps")
        file.writestr("corpus/empty", "\n")
    return archive


def test_tagged_words_become_plain_and_their_blank_lines_go(tagged, tmp_path):
    written = prepare_split(tagged, tmp_path / "text", strip_tags="/")
    assert (written.num_documents, written.num_words) == (2, 11)
    files = sorted(path.relative_to(written.folder).as_posix() for path in written.folder.rglob("*.txt"))
    assert files == ["corpus/ca01.txt", "corpus/deeper/cb02.txt"]
    text = (written.folder / "corpus" / "ca01.txt").read_text()
    assert text == "\tThe jury said 1\\/2 , / .\n\tA second one\n"


def test_a_folder_and_files_make_a_corpus(tagged, tmp_path):
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(tagged) as file:
        file.extractall(unpacked)
    (unpacked / ".hidden").write_text("left out")
    lines = [f"This is paragraph {number} of the test text .\n\n" for number in range(300)]
    (tmp_path / "test.tokens").write_text("".join(lines))
    corpus = tmp_path / "text"
    prepare_split(unpacked, corpus, strip_tags="/")
    prepare_split(tmp_path / "test.tokens", corpus, split="validation")
    result = CliRunner().invoke(
        app, ["prepare", str(tmp_path / "test.tokens"), "--output", str(corpus), "--split", "test"]
    )
    assert result.exit_code == 0, result.output
    assert "documents of 2,700 words" in result.output
    loaded = load_corpus(str(corpus))
    assert len(loaded.train) == 2
    assert "".join(document.text for document in loaded.test) == "".join(lines)
    assert 3 < len(loaded.test) < 10


def test_what_cannot_be_prepared_is_refused(tagged, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nothing").mkdir()
    output = tmp_path / "text"
    for source, settings, kind, message in [
        (tagged, {"split": "training"}, ConfigError, "train, validation or test; got 'training'"),
        (tagged, {"strip_tags": "//"}, ConfigError, "one character"),
        (tmp_path / "none", {}, DataError, "no such file or folder"),
        (tmp_path / "nothing", {}, DataError, "no text in it"),
        (tmp_path / "binary", {}, DataError, "not UTF-8 text"),
    ]:
        with pytest.raises(kind, match=message):
            prepare_split(source, output, **settings)
    assert not output.exists()
    prepare_split(tagged, output)
    with pytest.raises(DataError, match="something is there already"):
        prepare_split(tagged, output)


def encrypted(archive):
    """Set the bit of the flags that says so, in the header of the file and in the directory."""
    contents = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        contents[contents.index(signature) + offset] |= 1
    archive.write_bytes(contents)


def spoiled(archive):
    contents = bytearray(archive.read_bytes())
    contents[contents.index(b"The/at")] ^= 1
    archive.write_bytes(contents)


def without_directory(archive):
    contents = bytearray(archive.read_bytes())
    contents[contents.index(b"PK\x01\x02")] ^= 1
    archive.write_bytes(contents)


def truncated(archive):
    archive.write_bytes(archive.read_bytes()[:40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated, r"tagged.zip: cannot be read from the archive \(File is not a zip file"),
        (encrypted, r"tagged.zip: corpus/ca01: cannot be read from the archive \(.*password"),
        (spoiled, r"tagged.zip: corpus/ca01: cannot be read from the archive \(Bad CRC"),
        (without_directory, "tagged.zip: cannot be read from the archive"),
    ],
)
def test_an_archive_that_cannot_be_read_is_refused(tagged, tmp_path, change, message):
    change(tagged)
    with pytest.raises(DataError, match=message):
        prepare_split(tagged, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_a_file_of_an_archive_that_is_no_text_is_named(tagged, tmp_path):
    with zipfile.ZipFile(tagged, "a") as file:
        file.writestr("corpus/picture", b"\xff\xd8")
    with pytest.raises(DataError, match=r"tagged.zip: corpus/picture: not UTF-8 text"):
        prepare_split(tagged, tmp_path / "text")


def test_a_place_under_a_file_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ConfigError, match=r"cannot be written, because `.*file` is a file"):
        prepare_split(tmp_path / "none", tmp_path / "file" / "text")


def hold_out(corpus):
    """Add the splits without which a folder's train split is not recognized."""
    for split in ("validation", "test"):
        (corpus / split).mkdir()
        (corpus / split / "one.txt").write_text("held out")


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_names_that_differ_in_a_folder_alone_are_two_documents(kind, tmp_path):
    files = {"a/b": "first", "a_b": "second", "a/b.txt": "third"}
    source = tmp_path / "source"
    if kind == "folder":
        for name, text in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
    else:
        with zipfile.ZipFile(source, "w") as file:
            for name, text in files.items():
                file.writestr(name, text)
    assert prepare_split(source, tmp_path / "text").num_documents == 3
    hold_out(tmp_path / "text")
    loaded = {document.name: document.text for document in load_corpus(str(tmp_path / "text")).train}
    assert loaded == {
        "train/source/a/b.txt": "first",
        "train/source/a/b.txt.txt": "third",
        "train/source/a_b.txt": "second",
    }


def test_a_name_that_an_archive_has_twice_is_refused(tmp_path):
    for number, names in enumerate([("a", "/a"), ("a", "a.txt/b")]):
        archive = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.writestr(name, f"text of {name}")
        with pytest.raises(DataError, match=r"would overwrite another document, `a\.txt`: rename one"):
            prepare_split(archive, tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in (f"{tmp_path}/absolute", "../../above", "fine"):
            file.writestr(name, "text")
    written = prepare_split(tmp_path / "a.zip", tmp_path / "text")
    assert written.num_documents == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "text"}
    assert len(list(written.folder.rglob("*.txt"))) == 2


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_is_cut_as_it_is_when_it_is_loaded(end, tmp_path):
    """Other characters at which `str.splitlines` ends a line, such as form feeds, do not make a blank line."""
    rng = random.Random(0)
    lines = [
        " ".join(rng.choices(["word", "\x0c", "\x0c\x0c", "\x1c", "\x85", "\u2028", "another"], k=8))
        for _ in range(900)
    ]
    text = end.join(line if place % 13 else "" for place, line in enumerate(lines))
    (tmp_path / "book.txt").write_bytes(text.encode())
    prepare_split(tmp_path / "book.txt", tmp_path / "text")
    hold_out(tmp_path / "text")
    prepared = [document.text for document in load_corpus(str(tmp_path / "text")).train]
    parts = read_file(tmp_path / "book.txt", "text")
    loaded = {document.name: document.text for split in parts.values() for document in split}
    assert len(prepared) > 10
    assert prepared == [loaded[f"book.txt[{number}]"] for number in range(len(loaded))]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_preparation_that_is_killed_leaves_nothing_that_trains(tagged, tmp_path, monkeypatch):
    corpus = tmp_path / "text"
    (corpus / "train").mkdir(parents=True)
    (corpus / "train" / "one.txt").write_text("there before")
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "finish", lambda folder: (_ for _ in ()).throw(Killed))
        patch.setattr(unfinished, "clear", lambda folder: None)  # which a killed process does not come to
        with pytest.raises(Killed):
            prepare_split(tagged, corpus)
    assert list((corpus / "train" / UNFINISHED).rglob("ca01.txt"))
    whole = read_folder(corpus, "text")  # there are no splits yet: all that is in it
    assert [document.text for split in whole.values() for document in split] == ["there before"]
    hold_out(corpus)
    assert [document.text for document in load_corpus(str(corpus)).train] == ["there before"]
    prepare_split(tagged, corpus)
    assert sorted(path.name for path in (corpus / "train").iterdir()) == ["one.txt", "tagged.zip"]
    assert len(load_corpus(str(corpus)).train) == 3


def test_a_preparation_that_fails_leaves_nothing(tagged, tmp_path, disk_that_fills):
    with pytest.raises(OSError, match="No space left"):
        prepare_split(tagged, tmp_path / "text")
    assert list((tmp_path / "text").rglob("*")) == [tmp_path / "text" / "train"]


def with_tables(folder, form, *names):
    """Return a folder or an archive with files of these names, each with the row of a table."""
    (folder / "in").mkdir()
    for name in names:
        (folder / "in" / name).write_text('{"text": "a row"}\n')
    with zipfile.ZipFile(folder / "in.zip", "w") as archive:
        for name in names:
            archive.write(folder / "in" / name, name)
    return {"file": folder / "in" / names[0], "folder": folder / "in", "archive": folder / "in.zip"}[form]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".JSONL"])
@pytest.mark.parametrize("form", ["file", "folder", "archive"])
def test_tables_alone_are_refused(form, suffix, tmp_path):
    """Their rows would be one text, with its braces or commas."""
    source = with_tables(tmp_path, form, f"rows{suffix}")
    with pytest.raises(DataError, match=rf"no text in it: `rows{suffix}` is a table, .*`data.path` reads tables direc"):
        prepare_split(source, tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_tables_among_text_files_are_left_out_with_one_warning(form, tmp_path):
    source = with_tables(tmp_path, form, "a.txt", "b.json", "c.csv", ".hidden.json")
    with pytest.warns(SymphonyWarning, match="2 tables among its text files left out, such as `b.json`") as caught:
        written = prepare_split(source, tmp_path / "text")
    assert len(caught) == 1
    assert [path.name for path in written.folder.iterdir()] == ["a.txt.txt"]
