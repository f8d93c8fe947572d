"""The task `text`: perplexity of documents."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from symphony_hf.data.documents import Document
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.attacks.text import find_text_attack
from symphony_hf.evaluation.checkpoint import ModelUnderTest, load_tokenizer
from symphony_hf.evaluation.perplexity import score_tokens
from symphony_hf.evaluation.windows import (
    Tokens,
    Untouched,
    attacked_cuts,
    clean_cuts,
    cut,
    find_untouched,
    first_token,
    tokenize,
)

from .documents import AttackedCorpus, TextScores, prepare_texts
from .scales import Perplexity
from .settings import AttackCase, RobustnessSettings
from .task import Measured, Store, Task, open_models, source_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FORMAT = 1
"""Of an entry of the store. Raise it when the same model and text should give other numbers."""

_LARGEST_BLOCK = 1024
_USUAL_BLOCK = 512
"""Tokens of a window, where a model's config does not say how many it takes."""

_GROWTH = 4
"""How many times longer attacked text may be in tokens, at the default size of a window."""


class _Form(NamedTuple):
    """All documents in one form."""

    documents: list[Tokens]
    digest: str

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([len(tokens.ids) for tokens in self.documents])


def default_block_size(models_under_test: Sequence[ModelUnderTest]) -> int:
    """Tokens of a window that leave room for attacked text, which has more of them: the same for all models."""
    takes = [checkpoint.max_tokens for checkpoint in models_under_test if checkpoint.max_tokens]
    return max(2, min([_LARGEST_BLOCK, *(most // _GROWTH for most in takes)])) if takes else _USUAL_BLOCK


class TextMeasurer:
    """Measures models on the same texts.

    Args:
        corpus: Documents and their attacked forms.
        block_size: Tokens of a window of clean text.
        batch_size: Windows per forward pass.
        store: Earlier measurements.
    """

    def __init__(self, corpus: AttackedCorpus, block_size: int, batch_size: int, store: Store) -> None:
        self.corpus, self.block_size, self.batch_size, self.store = corpus, block_size, batch_size, store
        self.names = [document.name for document in corpus.documents]
        self._untouched: dict[tuple[str, str], list[Untouched]] = {}  # models mostly share a tokenizer

    def measure(
        self, checkpoint: ModelUnderTest, tokenizer: "PreTrainedTokenizerBase", role: str
    ) -> Measured[TextScores]:
        """One model on all forms; what is finished is kept if the process ends before the rest.

        Args:
            checkpoint: The model.
            tokenizer: Its own.
            role: What progress bars call it.

        Raises:
            ConfigError: If windows are longer than the model takes.
            EvaluationError: If a likelihood is not finite.
        """
        first = first_token(tokenizer)
        identity = {
            "format": _FORMAT,
            "model": checkpoint.fingerprint,
            "dtype": checkpoint.dtype,
            "first": first,
            "block_size": self.block_size,
        }
        clean = _form(self.corpus.documents, tokenizer)
        clean_nll = self._clean_nll(checkpoint, clean, first, identity, role)
        attacked = {}
        # disable=None: no bar where the output is not a terminal, such as a log file.
        for case in tqdm(self.corpus.attacked, desc=f"Measuring {role}", unit=" attacked texts", delay=2, disable=None):
            form = _form(self.corpus.attacked[case], tokenizer)
            attacked[case] = self._attacked_scores(checkpoint, case, (clean, form), clean_nll, first, identity)
        checkpoint.release()
        return Measured(self._clean_scores(clean, clean_nll), attacked)

    def _clean_nll(
        self, checkpoint: ModelUnderTest, clean: _Form, first: int, identity: Mapping[str, Any], role: str
    ) -> list[np.ndarray]:
        identity = {**identity, "clean": clean.digest}
        stored = self.store.load("clean", identity)
        if stored is None:
            windows = [cut(t.ids, clean_cuts(len(t.ids), self.block_size), first) for t in clean.documents]
            nll = self._score(checkpoint, windows, f"Scoring {role}, clean")
            stored = {"nll": np.concatenate(nll)}
            self.store.save("clean", identity, stored)
        return np.split(stored["nll"], np.cumsum(clean.lengths)[:-1])

    def _clean_scores(self, clean: _Form, nll: list[np.ndarray]) -> TextScores:
        """Nothing attacked: all tokens are untouched."""
        documents, sums = self.corpus.documents, _sums(nll)
        return TextScores(
            nll=sums,
            num_tokens=clean.lengths,
            num_words=_num_words(documents),
            num_bytes=_num_bytes(documents),
            untouched_nll=sums,
            untouched_clean_nll=sums,
            num_untouched=clean.lengths,
        )

    def _attacked_scores(
        self,
        checkpoint: ModelUnderTest,
        case: AttackCase,
        forms: tuple[_Form, _Form],
        clean_nll: list[np.ndarray],
        first: int,
        identity: Mapping[str, Any],
    ) -> TextScores:
        clean, attacked = forms
        identity = {**identity, "clean": clean.digest, "attacked": attacked.digest}
        stored = self.store.load(str(case), identity)
        if stored is None:
            untouched = self._find_untouched(clean, attacked, case)
            windows = [
                cut(
                    after.ids,
                    attacked_cuts(clean_cuts(len(before.ids), self.block_size), places, len(after.ids)),
                    first,
                )
                for before, after, places in zip(clean.documents, attacked.documents, untouched, strict=True)
            ]
            nll = self._score(checkpoint, windows, f"Scoring {case}")
            pairs = list(zip(clean_nll, nll, untouched, strict=True))
            stored = {
                "nll": _sums(nll),
                "untouched_nll": _sums([values[places.attacked] for _, values, places in pairs]),
                "untouched_clean_nll": _sums([values[places.clean] for values, _, places in pairs]),
                "num_untouched": np.array([len(places.clean) for places in untouched]),
            }
            self.store.save(str(case), identity, stored)
        return TextScores(
            num_tokens=attacked.lengths,
            num_words=_num_words(self.corpus.documents),
            num_bytes=_num_bytes(self.corpus.attacked[case]),
            **stored,
        )

    def _find_untouched(self, clean: _Form, attacked: _Form, case: AttackCase) -> list[Untouched]:
        key = (clean.digest, attacked.digest)
        if key not in self._untouched:
            pairs = list(zip(clean.documents, attacked.documents, strict=True))
            bar = tqdm(pairs, desc=f"Aligning {case}", unit=" documents", delay=2, disable=None)
            self._untouched[key] = [find_untouched(before, after) for before, after in bar]
        return self._untouched[key]

    def _score(self, checkpoint: ModelUnderTest, windows: list[list[Tensor]], progress: str) -> list[np.ndarray]:
        longest = max(len(window) for parts in windows for window in parts)
        if checkpoint.max_tokens is not None and longest > checkpoint.max_tokens:
            raise ConfigError(
                f"eval: {progress}: a window has {longest} tokens, and `{checkpoint.source}` takes "
                f"{checkpoint.max_tokens}: set --block_size below {self.block_size}, so that the same words "
                "fit under attack"
            )
        by_name = dict(zip(self.names, windows, strict=True))
        return list(score_tokens(checkpoint.model, by_name, batch_size=self.batch_size, progress=progress).values())


def _form(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> _Form:
    tokenized = tokenize(documents, tokenizer)
    digest = hashlib.sha256()
    for tokens in tokenized:
        digest.update(hashlib.sha256(np.array(tokens.ids, dtype=np.int64).tobytes()).digest())
    return _Form(tokenized, digest.hexdigest())


def _sums(nll: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([values.sum(dtype=np.float64) for values in nll])


def _num_words(documents: Sequence[Document]) -> np.ndarray:
    return np.array([len(document.text.split()) for document in documents])


def _num_bytes(documents: Sequence[Document]) -> np.ndarray:
    return np.array([len(document.text.encode(errors="surrogatepass")) for document in documents])


class TextTask(Task[TextScores]):
    """Documents in windows, and their attacked forms in windows of the same words."""

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        self.models_under_test = open_models(settings, AutoModelForCausalLM)
        sources = {role: source_of_text(settings, checkpoint) for role, checkpoint in self.models_under_test.items()}
        self.tokenizers = {role: load_tokenizer(*source) for role, source in sources.items()}
        self.corpus = prepare_texts(settings)
        self.block_size = settings.block_size or default_block_size(list(self.models_under_test.values()))
        self.measurer = TextMeasurer(self.corpus, self.block_size, settings.batch_size, store)
        self.report = Perplexity(self.measurer.names)
        self.attacks = settings.attacks or ()
        self.settings = dataclasses.asdict(settings) | {"block_size": self.block_size}
        self.notes = []

    def measure(self, role: str) -> Measured[TextScores]:
        """See `TextMeasurer`."""
        return self.measurer.measure(self.models_under_test[role], self.tokenizers[role], role)

    def describe(self, measured: Mapping[str, Measured[TextScores]]) -> dict[str, Any]:
        """What was evaluated on."""
        clean = measured["model"].clean
        return {
            "settings": self.settings,
            "rates": {name: list(find_text_attack(name).rates) for name in self.attacks},
            "documents": {
                "source": self.corpus.source,
                "number": len(self.corpus.documents),
                "unit": "documents",
                "words": int(clean.num_words.sum()),
                "bytes": int(clean.num_bytes.sum()),
            },
        }
