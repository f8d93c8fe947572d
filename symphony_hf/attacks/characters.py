"""What a letter can be mistaken for: its neighbours on a keyboard, and letters of another alphabet that look alike."""

_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""Of a QWERTY keyboard, and how far each row is shifted to the right, in widths of a key."""

_REACH = 1.3
"""Widths of a key. Nearer than this are the keys to the left and right, and those that touch above and below."""


def _neighbours() -> dict[str, str]:
    places = {key: (shift + column, row) for row, (keys, shift) in enumerate(_ROWS) for column, key in enumerate(keys)}
    return {
        key: "".join(
            other for other, (u, v) in places.items() if other != key and (x - u) ** 2 + (y - v) ** 2 < _REACH**2
        )
        for key, (x, y) in places.items()
    }


KEYBOARD = _neighbours()
"""Lower-case letter -> the letters whose keys touch its own."""

HOMOGLYPHS = str.maketrans(
    "aceijopsxyhdlqwvABCEHIJKMOPSTX",
    "асеіјорѕхуһԁӏԛԝѵАВСЕНІЈКМОРЅТХ",
)
"""Latin letter -> the Cyrillic one that looks the same, by code point. Source: Unicode's confusables.txt (UTS 39)."""


def typo_of(letter: str, draw: int) -> str:
    """The key that was hit instead of a letter's, in the letter's case.

    Args:
        letter: Of a to z, in either case.
        draw: A random number that chooses among the neighbours.
    """
    near = KEYBOARD[letter.lower()]
    hit = near[draw % len(near)]
    return hit.upper() if letter.isupper() else hit
