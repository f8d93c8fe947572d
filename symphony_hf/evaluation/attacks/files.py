"""A text file attacked: the way to a fixed test set that other software can read."""

from dataclasses import dataclass
from pathlib import Path

from symphony_hf.errors import ConfigError, DataError
from symphony_hf.files import replacing

from .text import find_text_attack
from .word_swap import word_swap


@dataclass(frozen=True)
class AttackedFile:
    """Summary of an attacked file.

    Attributes:
        path: Path of the attacked text.
        rate: Share of the places that the attack can change, as it was asked for.
        num_lines: Number of lines in the file.
        num_changed: Lines that differ.
    """

    path: Path
    rate: float
    num_lines: int
    num_changed: int


def attack_file(
    source: str | Path,
    output: str | Path,
    attack: str,
    *,
    severity: int = 1,
    rate: float | None = None,
    minimum: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> AttackedFile:
    """Write the attacked form of a text file, line by line the same but for the attack.

    The name of the file, without its folder, seeds the attack too: the same file gives the same text anywhere.

    Args:
        source: A text file, UTF-8.
        output: Where the attacked text goes; there is the whole of it or none.
        attack: The name of one of `TEXT_ATTACKS`.
        severity: From 1 to 5; 1 is the paper's, of `aaa`.
        rate: Share of the places that the attack can change, instead of a severity's.
        minimum: Of `aaa`: words replaced in a line at least; 1 when None, as in the paper.
        seed: Seed of the choice of places.
        overwrite: Whether a file at `output` may be replaced.

    Raises:
        ConfigError: If there is no such attack or severity, the rate is out of range, or `minimum` is not for it.
        DataError: If the file is not there or is not UTF-8, nothing in it can be changed, or `output` is taken.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    chosen = find_text_attack(attack)
    rate = chosen.rate(severity) if rate is None else rate
    if minimum is not None and attack != "aaa":
        raise ConfigError(f"attack {attack}: `minimum` is for aaa alone, which replaces words line by line")
    _check_output(source, output, overwrite)
    text = _read(source)
    if minimum is None:
        attacked = chosen(text, rate, seed=seed, name=source.name)
    else:
        attacked = word_swap(text, rate=rate, minimum=minimum, seed=seed, name=source.name)
    pairs = list(zip(text.split("\n"), attacked.split("\n"), strict=True))
    changed = sum(before != after for before, after in pairs)
    if not changed:
        raise DataError(f"{source}: {attack} at rate {rate} changes nothing in it: raise the rate, or take another")
    with replacing(output) as written:
        written.write_bytes(attacked.encode())  # as text, the ends of lines would change
    return AttackedFile(output, rate, len(pairs) - text.endswith("\n"), changed)


def _check_output(source: Path, output: Path, overwrite: bool) -> None:
    if not source.is_file():
        raise DataError(f"{source}: no such text file")
    if output.exists() and output.samefile(source):
        raise DataError(f"{output}: this is the file that is attacked; give another name for what is written")
    if output.is_dir() or (output.exists() and not overwrite):
        raise DataError(f"{output}: something is there already; give another name, or --overwrite to replace a file")


def _read(path: Path) -> str:
    try:
        # Bytes, because reading as text would change the ends of lines. -sig: without the mark some editors put first.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file") from error
