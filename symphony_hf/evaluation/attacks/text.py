"""Attacks on text, each at five severities."""

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError, DataError, SymphonyWarning, nearest
from symphony_hf.evaluation.words import are_spaced

from . import edits
from .edits import seed_of
from .word_swap import word_swap

SEVERITIES = (1, 2, 3, 4, 5)

_OF_LETTERS = (0.01, 0.02, 0.05, 0.1, 0.2)
_OF_WORDS = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class TextAttack:
    """One attack on text.

    Attributes:
        name: Name on the command line.
        what: Description of its effect.
        rates: Share of the changeable words or letters that are changed, by severity.
        of_words: Whether it changes words, which it finds by the spaces between them; otherwise letters.
    """

    name: str
    what: str
    rates: tuple[float, ...]
    _edit: Callable[[str, float, random.Random], str] | None = None
    minimum_per: Literal["text", "line"] = "text"
    of_words: bool = False

    def rate(self, severity: int) -> float:
        """Return the share at a severity from 1 to 5.

        Raises:
            ConfigError: If the severity is out of range.
        """
        check_severity(severity)
        return self.rates[severity - 1]

    def check_words(self, texts: Sequence[str], where: str) -> None:
        """Check that an attack on words finds words: without spaces between them, each line would be one.

        Texts without spaces among others give a SymphonyWarning.

        Raises:
            DataError: If no spaces separate the words of the texts, taken together.
        """
        if not self.of_words:
            return
        if not are_spaced(texts):
            raise DataError(
                f"{where}: {self.name} changes words, and no spaces separate the words of this text, so each line "
                "would count as one: use an attack on letters, such as char_swap"
            )
        warn_of_unspaced(texts, where, self.name, ", or use an attack on letters, such as char_swap")

    def __call__(self, text: str, rate: float, *, seed: int = 0, name: str = "") -> str:
        """Attack a text of any number of lines, which is kept. Something is changed, if anything in it can be.

        The document's name also seeds the choice, so that it is independent of other documents and their order. Raises
        ConfigError if `rate`, the share of the words or letters to change, is not between 0 and 1.
        """
        if not 0 <= rate <= 1:
            raise ConfigError(f"attack {self.name}: `rate` is a share and must be between 0 and 1; got {rate!r}")
        if self._edit is None:
            return word_swap(text, rate=rate, seed=seed, name=name)
        return self._edit(text, rate, random.Random(seed_of(self.name, seed, name)))


def warn_of_unspaced(texts: Sequence[str], where: str, attack: str, remedy: str = "") -> None:
    """Warn of texts without spaces among others, of which an attack on words counts each line as one word.

    Args:
        texts: The texts.
        where: Source of the texts.
        attack: Name of the attack.
        remedy: What to do instead of leaving them out.
    """
    number = sum(not are_spaced([text]) for text in texts)
    if number:
        warnings.warn(
            f"{where}: no spaces separate the words in {number} of {len(texts)} texts, so {attack} counts each of "
            f"their lines as one word: leave them out{remedy}",
            SymphonyWarning,
            stacklevel=3,
        )


TEXT_ATTACKS = {
    attack.name: attack
    for attack in (
        # The first is the paper's: 1.5% of a line's words, at least one.
        TextAttack(
            "aaa",
            "words become AAA, stop words left alone",
            (0.015, 0.05, 0.1, 0.2, 0.4),
            minimum_per="line",
            of_words=True,
        ),
        TextAttack("keyboard", "letters become their neighbours on the keyboard", _OF_LETTERS, edits.mistype),
        TextAttack("char_delete", "letters are missing", _OF_LETTERS, edits.delete_letters),
        TextAttack("char_insert", "letters are inserted", _OF_LETTERS, edits.insert_letters),
        TextAttack("char_swap", "neighbouring letters trade places", _OF_LETTERS, edits.swap_letters),
        TextAttack("homoglyph", "letters become look-alikes", _OF_LETTERS, edits.replace_by_homoglyphs),
        TextAttack("word_drop", "words are missing", _OF_WORDS, edits.drop_words, of_words=True),
        TextAttack(
            "word_shuffle", "runs of three words change their order", _OF_WORDS, edits.shuffle_words, of_words=True
        ),
    )
}
"""Attacks by name."""


def find_text_attack(name: str) -> TextAttack:
    """Return the attack with a name, or raise ConfigError with the nearest name."""
    if name not in TEXT_ATTACKS:
        raise ConfigError(f"attack: no attack on text is named {name!r}; {nearest(name, TEXT_ATTACKS)}")
    return TEXT_ATTACKS[name]


def check_severity(severity: int) -> None:
    """Check a severity.

    Raises:
        ConfigError: If it is not an integer from 1 to 5.
    """
    if severity not in SEVERITIES:
        raise ConfigError(f"attack: severity must be 1, 2, 3, 4 or 5; got {severity!r}")


def attack_documents(documents: Sequence[Document], attack: TextAttack, rate: float, seed: int) -> list[Document]:
    """Attack each document, seeded by its name."""
    return [
        Document(document.name, attack(document.text, rate, seed=seed, name=document.name)) for document in documents
    ]
