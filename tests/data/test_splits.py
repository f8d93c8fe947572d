"""`symphony prepare`: any local text becomes a split of a corpus."""

import zipfile

import pytest
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.data import load_corpus, prepare_split
from symphony_hf.errors import ConfigError, DataError

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
    assert sorted(path.name for path in written.folder.iterdir()) == ["corpus_ca01.txt", "corpus_deeper_cb02.txt"]
    text = (written.folder / "corpus_ca01.txt").read_text()
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
        (tagged, {"strip_tags": "//"}, ConfigError, "one sign"),
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
