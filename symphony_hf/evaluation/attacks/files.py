"""Attacked text files, for fixed test sets that other software can read."""

from dataclasses import dataclass
from pathlib import Path

from symphony_hf.errors import ConfigError, DataError
from symphony_hf.files import replacing
from symphony_hf.results import check_file_place

from .text import find_text_attack
from .word_swap import word_swap


@dataclass(frozen=True)
class AttackedFile:
    """Path of an attacked file, the attack, and the numbers of all and of changed lines."""

    path: Path
    attack: str
    rate: float
    seed: int
    num_lines: int
    num_changed: int


def attack_file(
    source: str | Path,
    output: str | Path,
    attack: str = "aaa",
    *,
    severity: int = 1,
    rate: float | None = None,
    minimum: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> AttackedFile:
    """Write the attacked form of a text file, with the same lines.

    The name of the file, without its folder, also seeds the attack: the same file gives the same text anywhere.

    Args:
        source: A text file, UTF-8.
        output: File for the attacked text.
        attack: aaa, keyboard, char_delete, char_insert, char_swap, homoglyph, word_drop or word_shuffle.
        severity: Severity from 1 to 5; 1 is the paper's setting for aaa.
        rate: Share of words or letters to change, instead of a severity.
        minimum: Minimum number of words replaced per line, 1 by default; for aaa.
        seed: Random seed.
        overwrite: Whether to replace an existing file.

    Raises:
        ConfigError: If the attack or severity is unknown, the rate is out of range, or the attack has no `minimum`.
        DataError: If the file does not exist or is not UTF-8, nothing in it can be changed, no spaces separate the
            words that the attack changes, or `output` exists.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    chosen = find_text_attack(attack)
    rate = chosen.rate(severity) if rate is None else rate
    if minimum is not None and attack != "aaa":
        raise ConfigError(f"attack {attack}: `minimum` is for aaa alone, which replaces words line by line")
    _check_output(source, output, overwrite)
    text = _read(source)
    chosen.check_words([text], str(source))
    if minimum is None:
        attacked = chosen(text, rate, seed=seed, name=source.name)
    else:
        attacked = word_swap(text, rate=rate, minimum=minimum, seed=seed, name=source.name)
    pairs = list(zip(text.split("\n"), attacked.split("\n"), strict=True))
    changed = sum(before != after for before, after in pairs)
    if not changed:
        raise DataError(
            f"{source}: {attack} at rate {rate} changes nothing in it: raise the rate, or use another attack"
        )
    with replacing(output) as written:
        written.write_bytes(attacked.encode())  # as text, line endings would change
    return AttackedFile(output, attack, rate, seed, len(pairs) - text.endswith("\n"), changed)


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    check_file_place(output, "attack")
    if not source.is_file():
        raise DataError(f"{source}: the text file does not exist")
    if output.exists() and output.samefile(source):
        raise DataError(f"{output}: the output would replace the input; give another name")
    if output.is_dir() or (output.exists() and not overwrite):
        raise DataError(f"{output}: already exists; give another name, or --overwrite to replace a file")


def _read(path: Path) -> str:
    try:
        # Bytes, because reading as text would change line endings. -sig: without the byte order mark of some editors.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file") from error
