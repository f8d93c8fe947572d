"""Training under damage: input that is damaged as `symphony eval` would damage it, and not scored where it is.

Each row is decoded, attacked and tokenized again when the Trainer takes it, so that every epoch sees other damage.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from symphony_hf.data.blocks import NO_LABEL, end_of_text
from symphony_hf.data.prepared import PreparedData
from symphony_hf.errors import ConfigError, DataError
from symphony_hf.evaluation.attacks.text import TextAttack, find_text_attack
from symphony_hf.settings import parse_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from symphony_hf.recipe import Recipe


_PROBED = 8
"""Number of rows that a tokenizer, and an attack on words, are checked on."""

_READ_BACK = 0.95
"""Minimum share of tokens that it must give back; the ends of a row may cut a character."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Damage of the training input, `data.damage` in a recipe.

    Args:
        attack: Name of an attack on text, as for `symphony eval`.
        rate: Share of the words or letters to change, from 0 to 1. If it is not 0, at least one is changed in each row;
            by `aaa`, in each line, so that short lines lose a larger share.

    Raises:
        ConfigError: If the attack is unknown, or the rate is out of range.
    """

    attack: str
    rate: float

    def __post_init__(self) -> None:
        find_text_attack(self.attack)
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"`rate` is a share of words or letters, from 0 to 1; got {self.rate!r}")

    def describe(self) -> str:
        """Return the damage in words, for plans and reports."""
        attack = find_text_attack(self.attack)
        part = {"text": "row", "line": "line"}[attack.minimum_per]  # a row is damaged as one text
        least = f", at least one in each {part}" if self.rate else ""
        how = f"{self.attack} at {self.rate:g}{least} ({attack.what})"
        return f"training input damaged anew in each epoch: {how}; not scored there"


def damage_of(recipe: "Recipe") -> Damage | None:
    """Read the damage of a recipe's data section; None without damage.

    Raises:
        ConfigError: If a setting is unknown or out of range, or the data is not cut into blocks of text in advance.
    """
    section = recipe.data
    if section.damage is None:
        return None
    damage: Damage = parse_settings(Damage, section.damage, "data: damage")
    if section.kind != "text" or section.streaming:
        what = "a stream" if section.kind == "text" else f"data of kind `{section.kind}`"
        raise ConfigError(
            f"data: damage: only `text` without `streaming` can be damaged in training, not {what}: leave `damage` out"
        )
    return damage


def damaged(data: PreparedData, damage: Damage, tokenizer: "PreTrainedTokenizerBase", seed: int) -> PreparedData:
    """Return data whose train split is damaged; what is evaluated stays as it is.

    Args:
        data: Data of kind `text`.
        damage: The damage.
        tokenizer: The model's tokenizer.
        seed: Seed of the damage.

    Raises:
        ConfigError: If the tokenizer does not give a text its tokens back, or no spaces separate the words that the
            damage changes.
    """
    rows = DamagedRows(data.train, damage, tokenizer, seed)
    rows.check_tokenizer()
    rows.check_words()
    return replace(data, train=rows, notes=[*data.notes, damage.describe()])


class DamagedRows(Dataset[dict[str, Tensor]]):
    """Rows of another dataset, damaged when they are taken, by a seed of the epoch and the row.

    Args:
        rows: Dataset of rows with `input_ids`, `labels` and, if documents are packed, `position_ids`.
        damage: The damage.
        tokenizer: Tokenizer of the rows.
        seed: Seed of the damage.

    Attributes:
        epoch: Number of the epoch; `DamageEpochs` sets it.
    """

    def __init__(self, rows: Any, damage: Damage, tokenizer: "PreTrainedTokenizerBase", seed: int) -> None:
        self.rows, self.damage, self.tokenizer, self.seed = rows, damage, tokenizer, seed
        self.attack: TextAttack = find_text_attack(damage.attack)
        self.end = end_of_text(tokenizer)
        self.epoch = 0

    def check_tokenizer(self) -> None:
        """Check on a few rows that undamaged text gets its tokens back; others would be left out of the loss.

        Raises:
            ConfigError: If it does not.
        """
        before = [self.rows[index]["input_ids"].tolist() for index in range(min(_PROBED, len(self.rows)))]
        kept = [keep for ids in before for keep in left_alone(ids, self._encode(self._decode(ids)))]
        same = sum(kept) / max(sum(map(len, before)), len(kept))
        if same < _READ_BACK:
            raise ConfigError(
                f"data: damage: {type(self.tokenizer).__name__} gives decoded text only {same:.0%} of its tokens back, "
                "so that text which was left alone would count as damaged: leave `damage` out"
            )

    def check_words(self) -> None:
        """Check on a few rows of the whole dataset that an attack on words finds words.

        Rows without spaces among others give a SymphonyWarning.

        Raises:
            ConfigError: If no spaces separate the words of these rows, taken together.
        """
        if self.damage.rate == 0:
            return
        chosen = range(0, len(self.rows), -(-len(self.rows) // _PROBED))  # the first ones alone may be of one text
        try:
            texts = [self._decode(self.rows[index]["input_ids"].tolist()) for index in chosen]
            self.attack.check_words(texts, "data: damage: rows of the data")
        except DataError as error:
            raise ConfigError(str(error)) from error

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row of the same length. Labels are -100 at each token that the damage put in.

        A row that the damage makes longer loses its end; one that it makes shorter is filled with end-of-text tokens,
        which are not scored.
        """
        row = self.rows[index]
        if self.damage.rate == 0:
            return row
        ids, starts = row["input_ids"].tolist(), self._starts(row)
        parts = [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
        new_ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for start, (part, kept) in zip(starts, self._damage(parts, f"{self.epoch} {index}"), strict=True):
            scored = [token if keep else NO_LABEL for token, keep in zip(part, kept, strict=True)]
            if int(row["labels"][start]) == NO_LABEL:
                scored[:1] = [NO_LABEL] * len(scored[:1])
            first = int(row["position_ids"][start]) if "position_ids" in row else 0
            new_ids += part
            labels += scored
            positions += range(first, first + len(part))
        filled = max(0, len(ids) - len(new_ids))
        columns = {
            "input_ids": new_ids + [self.end] * filled,
            "labels": labels + [NO_LABEL] * filled,
            "position_ids": positions + list(range(filled)),
        }
        return {name: torch.tensor(columns[name][: len(ids)]) for name in row}

    def _starts(self, row: Mapping[str, Tensor]) -> list[int]:
        """Return the indices at which documents begin in a row, with the first index."""
        if "position_ids" in row:
            begins = (row["position_ids"] == 0).nonzero().flatten().tolist()
        else:
            begins = ((row["input_ids"] == self.end).nonzero().flatten() + 1).tolist()
        return sorted({0, *(begin for begin in begins if begin < len(row["input_ids"]))})

    def _damage(self, parts: list[list[int]], name: str) -> list[tuple[list[int], list[bool]]]:
        """Return the damaged tokens of each document's part, and whether each was left alone.

        The row is damaged as one text, of which the rate is a share. No attack adds or removes a line.
        """
        bodies = [part[:-1] if part[-1] == self.end else part for part in parts]
        texts = [self._decode(body) for body in bodies]
        lines = self.attack("\n".join(texts), self.damage.rate, seed=self.seed, name=name).split("\n")
        damaged = []
        for part, body, text in zip(parts, bodies, texts, strict=True):
            count = text.count("\n") + 1
            attacked, lines = "\n".join(lines[:count]), lines[count:]
            new, kept = self._tokenize(text, attacked, body)
            closing = part[len(body) :]
            damaged.append(([*new, *closing], [*kept, *[True] * len(closing)]))
        return damaged

    def _tokenize(self, text: str, attacked: str, before: list[int]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a damaged text, and whether each was left alone.

        If no letter moved, these are the tokens that stand for the same letters in the same place; otherwise, those
        that both texts have in the same order.
        """
        if len(text) != len(attacked) or not self.tokenizer.is_fast:
            after = self._encode(attacked)
            return after, left_alone(before, after)
        old, new = (
            self.tokenizer(one, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for one in (text, attacked)
        )
        known = set(zip(old["offset_mapping"], old["input_ids"], strict=True))
        spans = zip(new["offset_mapping"], new["input_ids"], strict=True)
        kept = [span in known and text[slice(*span[0])] == attacked[slice(*span[0])] for span in spans]
        return new["input_ids"], kept


def left_alone(before: list[int], after: list[int]) -> list[bool]:
    """Return whether each token of a damaged text is one of the text before, in its order.

    Args:
        before: Tokens of the text.
        after: Tokens of the damaged text.
    """
    kept = [False] * len(after)
    for match in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        kept[match.b : match.b + match.size] = [True] * match.size
    return kept


class DamageEpochs(TrainerCallback):
    """Callback that tells damaged rows the epoch, so that a resumed run repeats its damage.

    Args:
        rows: Damaged rows of the Trainer.
    """

    def __init__(self, rows: DamagedRows) -> None:
        self.rows = rows

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first row is taken."""
        self.rows.epoch = int((state.epoch or 0) + 1e-6)  # a sum of shares
