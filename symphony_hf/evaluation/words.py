"""Words of texts, also of those whose words no spaces separate, such as Chinese, Japanese or Thai."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_LONGEST_WORD = 50
"""Maximum mean number of bytes in a word. Above it, the text has no spaces, and a perplexity per word may overflow."""

_SAMPLE = 10_000
"""Number of characters of a text that tell its script."""

_UNSPACED = (
    *("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC ITERATION MARK"),
    *("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)
"""Beginnings of the Unicode names of letters in scripts without spaces between words. Hangul has them."""

_LETTERS_PER_SPACE = 6
"""Maximum number of letters for each space in such a script where words have been separated (segmented)."""

_BYTES_PER_WORD = 6
"""Number of bytes that count as one word in text without spaces: an English word, or two Chinese characters."""

_WORD = re.compile(r"\S+")


def has_spaces(num_words: int, num_bytes: int) -> bool:
    """Whether the words of a text are short enough to count by them, unlike those between spaces in Chinese."""
    return num_bytes <= _LONGEST_WORD * num_words


def num_bytes(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text.encode(errors="surrogatepass"))  # file names and texts need not be valid Unicode


def are_spaced(texts: Sequence[str]) -> bool:
    """Whether spaces separate the words of texts, taken together, in the scripts of at least half of their letters.

    In the other scripts, few spaces do not: Thai has some between phrases. A line of English may be a single word.
    """
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(text[:_SAMPLE])
    counts = {letter: number for letter, number in letters.items() if letter.isalpha()}
    unspaced = sum(number for letter, number in counts.items() if unicodedata.name(letter, "").startswith(_UNSPACED))
    is_segmented = 0 < sum(counts.values()) <= _LETTERS_PER_SPACE * letters[" "]
    return is_segmented or 2 * unspaced <= sum(counts.values())


def count_words(text: str, is_spaced: bool) -> int:
    """Count the words of a text: between spaces, or by its bytes if it has none."""
    return len(text.split()) if is_spaced else num_bytes(text) // _BYTES_PER_WORD


def first_words(text: str, number: int, is_spaced: bool) -> str:
    """Return the beginning of a text with a number of words, as `count_words` counts them; all of it if it has fewer.

    It ends after a word, or, without spaces, after a character.
    """
    if is_spaced:
        ends = [match.end() for match in _WORD.finditer(text)]
        return text[: ends[number - 1]] if number < len(ends) else text
    size = 0
    for position, letter in enumerate(text):
        size += num_bytes(letter)
        if size > number * _BYTES_PER_WORD:
            return text[:position]
    return text
