"""`symphony attack`, and the word swap that it writes against a recount of what is in the two files."""

import re
from collections import Counter

import pytest
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.files import attack_file

# Function words that any list of stop words has, whatever else is on it.
SURE_STOP_WORDS = {"the", "of", "and", "a", "in", "to", "was", "is", "it", "that", "he", "his", "with", "as", "on"}

SENTENCE = "The harbour of the old town was rebuilt in 1874 , and it is said that he saw its towers on a hill ."


@pytest.fixture
def source(tmp_path):
    """Lines of very different lengths, with an empty one and one of stop words alone, in the form of WikiText."""
    lines = [" " + " ".join((SENTENCE.split() * 40)[: 7 * number**2]) + " " for number in range(1, 9)]
    path = tmp_path / "wiki.test.tokens"
    path.write_text("\n".join([" = Harbour = ", "", *lines, " the of and a ", " Towers rise . "]) + "\n")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["attack", *map(str, arguments)])


def words_of(line):
    return [word for word in line.split() if re.search(r"\w", word)]


def test_the_command_writes_what_the_paper_describes(source, tmp_path):
    output = tmp_path / "attacked.tokens"
    result = run(source, "--attack", "aaa", "--seed", 0, "--output", output)
    assert result.exit_code == 0, result.output
    before, after = (path.read_text().split("\n") for path in (source, output))
    replaced = Counter()
    total = 0
    for line, attacked in zip(before, after, strict=True):
        pairs = list(zip(line.split(), attacked.split(), strict=True))
        hit = [old for old, new in pairs if new != old]
        assert {new for old, new in pairs if new != old} <= {"AAA"}
        assert re.sub(r"\S+", "w", line) == re.sub(r"\S+", "w", attacked)  # spaces stay
        # At the default rate: 1.5% of the line's words, rounded half up, and one at least where there is one.
        if words_of(line) and line.strip() != "the of and a":
            assert len(hit) == max(1, int(0.015 * len(words_of(line)) + 0.5))
        else:
            assert not hit
        replaced.update(hit)
        total += len(words_of(line))
    assert not SURE_STOP_WORDS & {word.lower() for word in replaced}
    assert len(replaced) >= 8  # of the sentence's ten other words: the choice is spread over them
    assert 0.012 < sum(replaced.values()) / total < 0.03  # above 1.5%, for the lines of few words
    num_changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert f"{num_changed} of {len(before) - 1} lines changed" in result.output


def test_the_same_seed_gives_the_same_file_anywhere_and_another_seed_another(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / source.name
    moved.write_bytes(source.read_bytes())
    written = [
        attack_file(path, tmp_path / f"{number}.txt", "aaa", seed=seed).path.read_bytes()
        for number, (path, seed) in enumerate([(source, 0), (source, 0), (moved, 0), (source, 1)])
    ]
    assert written[0] == written[1] == written[2] != written[3]


def test_rate_and_minimum_are_options(source, tmp_path):
    result = run(source, "--rate", 0.3, "--minimum", 3, "--output", tmp_path / "a.txt")
    assert result.exit_code == 0, result.output
    hits = [line.count("AAA") for line in (tmp_path / "a.txt").read_text().split("\n")]
    longest = source.read_text().split("\n")[9]
    assert hits[9] == int(0.3 * len(words_of(longest)) + 0.5)
    assert hits[0] == 1  # the title's only word
    assert hits[2] == 3  # of seven words, three of them no stop words


def test_ends_of_lines_stay_and_a_byte_order_mark_goes(tmp_path):
    source = tmp_path / "dos.txt"
    source.write_bytes("\ufeffTowers rise\r\n\r\nHarbours sink\r\n".encode())
    written = attack_file(source, tmp_path / "out.txt", "word_drop", severity=5).path.read_bytes()
    assert written.count(b"\r\n") == 3
    assert not written.startswith("\ufeff".encode())


def test_what_cannot_be_done_is_refused_and_nothing_is_written(source, tmp_path):
    output = tmp_path / "out.txt"
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("1 2 3\n")
    chinese = tmp_path / "chinese.txt"
    chinese.write_text("机器翻译的质量取决于数据和模型的规模以及训练的方法\n" * 3, encoding="utf-8")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, kind, message in [
        ((source, output, "aa"), ConfigError, r"'aa'; did you mean `aaa`"),
        ((tmp_path / "none", output, "aaa"), DataError, r"none: the text file does not exist"),
        ((source, source, "aaa"), DataError, r"the output would replace the input"),
        ((numbers, output, "keyboard"), DataError, r"keyboard at rate 0.01 changes nothing"),
        ((chinese, output, "aaa"), DataError, r"chinese.txt: aaa changes words, and no spaces separate the words"),
        ((binary, output, "aaa"), DataError, r"not UTF-8 text"),
    ]:
        with pytest.raises(kind, match=message):
            attack_file(*arguments)
    with pytest.raises(ConfigError, match="`minimum` is for aaa alone"):
        attack_file(source, output, "keyboard", minimum=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary", "chinese.txt", "numbers.txt", source.name]


def test_a_file_that_is_there_is_replaced_only_when_asked(source, tmp_path):
    output = tmp_path / "out.txt"
    output.write_text("precious")
    with pytest.raises(DataError, match="--overwrite"):
        attack_file(source, output, "aaa")
    assert output.read_text() == "precious"
    assert attack_file(source, output, "aaa", overwrite=True).num_changed
    assert "AAA" in output.read_text()


def test_a_place_under_a_file_is_refused(source):
    with pytest.raises(ConfigError, match=r"cannot be written, because `.*wiki.test.tokens` is a file"):
        attack_file(source, source / "attacked.tokens")
