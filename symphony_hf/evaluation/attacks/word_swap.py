"""The word-swap attack: some words of every line are replaced by a generic token."""

import hashlib
import random
import re
from collections.abc import Sequence
from fractions import Fraction

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, DataError

_WORD = re.compile(r"\S+")
_PUNCTUATION = re.compile(r"^[\W_]+|[\W_]+$")

_FUNCTION_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between both
but by can cannot could did do does doing down during each either else few for from further had has have having he
her here hers herself him himself his how i if in into is it its itself just may me might more most must my myself
neither no nor not now of off on once only or other ought our ours ourselves out over own same shall she should so some
such than that the their theirs them themselves then there these they this those through to too under until up upon
very was we were what when where whether which while who whom whose why will with within without would yet you your
yours yourself yourselves
aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he's i'd i'll i'm i've isn't it's let's mustn't
she's shouldn't that's there's they're wasn't we're weren't what's won't wouldn't you'd you'll you're you've
d ll m n't re s t ve
ain aren couldn didn doesn don hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn
"""

STOP_WORDS = frozenset(_FUNCTION_WORDS.split())
"""English function words, which the attack leaves alone. The last lines are fragments such as of "didn't"."""


def word_swap(
    text: str,
    *,
    rate: float = 0.015,
    minimum: int = 1,
    token: str = "AAA",
    seed: int = 0,
    name: str = "",
) -> str:
    """Replace some words of each line by a generic token.

    Words are separated by whitespace and have a letter or digit. In a line with n words, max(minimum, rate * n rounded
    half up) words are replaced, including attached punctuation. They are drawn without replacement from the words that
    are not stop words; if these are fewer, all are replaced. Whitespace and lines do not change.

    Args:
        text: Any number of lines.
        rate: Share of a line's words, from 0 to 1.
        minimum: Minimum number of words replaced per line, as far as it has them.
        token: Replacement, a single word.
        seed: Seed of the choice of words.
        name: Name of the document, which also seeds the choice, so that it is independent of other documents and
            their order.

    Returns:
        The text with words replaced. `rate` 0 with `minimum` 0 changes nothing.

    Raises:
        ConfigError: If `rate` or `minimum` is out of range, or `token` is not one word.

    Source: arXiv 2510.16411, WikiText-103 attacked by TextAttack's word swap. Deviation: TextAttack truncates
        rate * n, and keeps the punctuation that is attached to a replaced word.
    """
    _check(rate, minimum, token)
    share = Fraction(str(float(rate)))  # exact decimal: 0.35 * 90 is 31.5, but less in floating point
    # surrogatepass: file names need not be valid text.
    seed_bytes = hashlib.sha256(f"{seed} {name}".encode(errors="surrogatepass")).digest()
    rng = random.Random(int.from_bytes(seed_bytes, "big"))
    return "\n".join(_swap_line(line, share, minimum, token, rng) for line in text.split("\n"))


def attack(
    documents: Sequence[Document],
    *,
    rate: float = 0.015,
    minimum: int = 1,
    token: str = "AAA",
    seed: int = 0,
) -> list[Document]:
    """Apply `word_swap` to each document, seeded by its name.

    Args:
        documents: Documents, in any order.
        rate: Share of a line's words, from 0 to 1.
        minimum: Minimum number of words replaced per line, as far as it has them.
        token: Replacement, a single word.
        seed: Seed of the choice of words.

    Returns:
        Documents of the same names, in the same order.

    Raises:
        ConfigError: If `rate` or `minimum` is out of range, or `token` is not one word.
    """
    return [
        Document(
            document.name,
            word_swap(document.text, rate=rate, minimum=minimum, token=token, seed=seed, name=document.name),
        )
        for document in documents
    ]


def words_changed(original: str, attacked: str) -> int:
    """Count the words that an attack replaced. Raises DataError if the texts have different numbers of words."""
    before, after = original.split(), attacked.split()
    if len(before) != len(after):
        raise DataError(f"expected a text and its word-swapped form; got {len(before):,} and {len(after):,} words")
    return sum(old != new for old, new in zip(before, after, strict=True))


def _check(rate: float, minimum: int, token: str) -> None:
    if not 0 <= rate <= 1:
        raise ConfigError(f"attack: rate is the share of a line's words and must be between 0 and 1; got {rate!r}")
    if minimum < 0:
        raise ConfigError(f"attack: minimum is a number of words in each line and must be 0 or more; got {minimum!r}")
    if not _WORD.fullmatch(token):
        raise ConfigError(f"attack: token must be one word, without whitespace; got {token!r}")


def _swap_line(line: str, share: Fraction, minimum: int, token: str, rng: random.Random) -> str:
    words = [match for match in _WORD.finditer(line) if any(map(str.isalnum, match[0]))]
    candidates = [match for match in words if not _is_stop_word(match[0])]
    rounded = (2 * share.numerator * len(words) + share.denominator) // (2 * share.denominator)  # half up
    wanted = max(minimum, rounded)
    chosen = rng.sample(candidates, min(wanted, len(candidates)))
    pieces, end = [], 0
    for match in sorted(chosen, key=re.Match.start):
        pieces += [line[end : match.start()], token]
        end = match.end()
    return "".join(pieces) + line[end:]


def _is_stop_word(word: str) -> bool:
    return _PUNCTUATION.sub("", word).replace("’", "'").lower() in STOP_WORDS
