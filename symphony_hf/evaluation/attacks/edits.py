"""Changes to a share of a text's letters or words. None adds or removes a line.

Positions are drawn in an order that does not depend on the share, so a larger share includes the changes of a smaller
one. At least one position is changed if the text has any.
"""

import hashlib
import itertools
import math
import random
import re
import string
from collections.abc import Callable, Sequence
from fractions import Fraction

_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""Rows of a QWERTY keyboard, and the shift of each row to the right, in key widths."""

_REACH = 1.3
"""Distance in key widths within which two keys are neighbours."""


def _neighbours() -> dict[str, str]:
    positions = {
        key: (shift + column, row) for row, (keys, shift) in enumerate(_ROWS) for column, key in enumerate(keys)
    }
    return {
        key: "".join(
            other for other, (u, v) in positions.items() if other != key and (x - u) ** 2 + (y - v) ** 2 < _REACH**2
        )
        for key, (x, y) in positions.items()
    }


KEYBOARD = _neighbours()
"""Neighbouring keys by lower-case letter."""

HOMOGLYPHS = str.maketrans(
    "aceijopsxyhdlqwvABCEHIJKMOPSTX",
    "асеіјорѕхуһԁӏԛԝѵАВСЕНІЈКМОРЅТХ",
)
"""Cyrillic look-alikes by code point of the Latin letter. Source: Unicode's confusables.txt (UTS 39)."""


def typo_of(letter: str, draw: int) -> str:
    """Return a neighbouring key in the letter's case, chosen by a random number. The letter is from a to z."""
    near = KEYBOARD[letter.lower()]
    hit = near[draw % len(near)]
    return hit.upper() if letter.isupper() else hit


_WORD = re.compile(r"\S+")
_DRAWS = 1 << 30
_RUN = 3
"""Number of words that are reordered together."""


def num_changed(rate: float, num_candidates: int) -> int:
    """Return the number of changed candidates: the share, rounded half up, and at least one."""
    share = Fraction(str(float(rate)))  # exact decimal: 0.35 * 90 is 31.5, but less in floating point
    return min(num_candidates, max(1, math.floor(share * num_candidates + Fraction(1, 2))))


def mistype(text: str, rate: float, rng: random.Random) -> str:
    """Replace letters by neighbours on the keyboard."""
    return _edit_letters(text, rate, rng, lambda letter: letter.lower() in KEYBOARD and letter.isascii(), typo_of)


def delete_letters(text: str, rate: float, rng: random.Random) -> str:
    """Delete letters."""
    return _edit_letters(text, rate, rng, str.isalpha, lambda letter, draw: "")


def insert_letters(text: str, rate: float, rng: random.Random) -> str:
    """Insert random letters from a to z after letters."""
    letters = string.ascii_lowercase
    return _edit_letters(text, rate, rng, str.isalpha, lambda letter, draw: letter + letters[draw % len(letters)])


def replace_by_homoglyphs(text: str, rate: float, rng: random.Random) -> str:
    """Replace letters by Cyrillic look-alikes."""
    can = frozenset(map(chr, HOMOGLYPHS))
    return _edit_letters(text, rate, rng, can.__contains__, lambda letter, draw: letter.translate(HOMOGLYPHS))


def swap_letters(text: str, rate: float, rng: random.Random) -> str:
    """Swap letters with the next one, each letter at most once."""
    letters = list(text)
    pairs = itertools.pairwise(text)
    candidates = [position for position, (a, b) in enumerate(pairs) if a.isalpha() and b.isalpha() and a != b]
    left = num_changed(rate, len(candidates))
    moved: set[int] = set()
    for position in rng.sample(candidates, len(candidates)):
        if left and not moved & {position, position + 1}:
            letters[position : position + 2] = letters[position + 1], letters[position]
            moved |= {position, position + 1}
            left -= 1
    return "".join(letters)


def drop_words(text: str, rate: float, rng: random.Random) -> str:
    """Drop words together with the space before them. Lines keep their indentation."""
    dropped = set(_chosen(range(len(_WORD.findall(text))), rate, rng))
    numbers = itertools.count()
    return "\n".join(_without(line, dropped, numbers) for line in text.split("\n"))


def shuffle_words(text: str, rate: float, rng: random.Random) -> str:
    """Rotate runs of three words of a line, or of two at its end, so that no word keeps its position."""
    runs = _runs(text)
    pieces = list(text)
    for number in _chosen(range(len(runs)), rate, rng):
        run = runs[number]
        turn = rng.randrange(1, len(run))
        for old, new in zip(run, run[turn:] + run[:turn], strict=True):
            pieces[old.start() : old.end()] = [new[0], *[""] * (len(old[0]) - 1)]
    return "".join(pieces)


def _edit_letters(
    text: str,
    rate: float,
    rng: random.Random,
    can: Callable[[str], bool],
    edit: Callable[[str, int], str],
) -> str:
    letters = list(text)
    candidates = [position for position, letter in enumerate(text) if can(letter)]
    for position in _chosen(candidates, rate, rng):
        letters[position] = edit(letters[position], rng.randrange(_DRAWS))
    return "".join(letters)


def _chosen(candidates: Sequence[int], rate: float, rng: random.Random) -> list[int]:
    return rng.sample(candidates, len(candidates))[: num_changed(rate, len(candidates))]


def _without(line: str, dropped: set[int], numbers: "itertools.count[int]") -> str:
    """Return a line without the dropped words, which are given by their index in the text."""
    words, gaps = _WORD.findall(line), _WORD.split(line)
    kept = [position for position in range(len(words)) if next(numbers) not in dropped]
    if len(kept) == len(words):
        return line
    pieces = [gaps[0]]
    for number, position in enumerate(kept):
        pieces += [gaps[position] if number else "", words[position]]
    return "".join([*pieces, gaps[-1]])


def _runs(text: str) -> list[list["re.Match[str]"]]:
    """Return the words of each line in runs of three, except for runs that have no other order."""
    runs = []
    start = 0
    for line in text.split("\n"):
        words = list(_WORD.finditer(text, start, start + len(line)))
        runs += [words[position : position + _RUN] for position in range(0, len(words), _RUN)]
        start += len(line) + 1
    return [run for run in runs if len({word[0] for word in run}) > 1]


def seed_of(attack: str, seed: int, name: str) -> int:
    """Return a seed of 256 bits for an attack on the document or image of a name.

    The severity is not part of it, so that a higher severity includes the changes of a lower one.
    """
    # surrogatepass: file names need not be valid text.
    digest = hashlib.sha256(f"{attack} {seed} {name}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest, "big")
