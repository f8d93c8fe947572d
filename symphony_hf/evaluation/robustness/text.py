"""The task `text`: perplexity of documents."""

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from symphony_hf.data.documents import Document
from symphony_hf.errors import SymphonyWarning
from symphony_hf.evaluation.attacks.text import find_text_attack
from symphony_hf.evaluation.checkpoint import load_tokenizer
from symphony_hf.evaluation.clean_attacked import Measured
from symphony_hf.evaluation.documents import prepare_corpus
from symphony_hf.evaluation.perplexity import score_tokens
from symphony_hf.evaluation.settings import AttackCase
from symphony_hf.evaluation.windows import (
    Tokens,
    Untouched,
    check_context,
    cut_attacked,
    cut_clean,
    default_block_size,
    find_untouched,
    first_token,
    longest_attacked,
    tokenize,
)
from symphony_hf.evaluation.words import num_bytes

from .metric_reports import Perplexity
from .settings import RobustnessSettings
from .task import Store, Task
from .text_scores import TextScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Form(NamedTuple):
    """All documents in one form."""

    documents: list[Tokens]
    digest: str

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document."""
        return np.array([len(tokens.ids) for tokens in self.documents])

    @property
    def highest(self) -> int:
        """Highest token id."""
        return max(max(tokens.ids) for tokens in self.documents)

    def packed(self) -> "_Form":
        """Return the form with its ids and lines in int32 arrays: a tenth of the memory, but for unknown tokens."""
        return self._replace(
            documents=[
                tokens._replace(ids=np.array(tokens.ids, dtype=np.int32), lines=tokens.lines.astype(np.int32))  # type: ignore[arg-type]
                for tokens in self.documents
            ]
        )

    def unpacked(self) -> "_Form":
        """Return the form with its ids in lists."""
        return self._replace(documents=[t._replace(ids=np.asarray(t.ids).tolist()) for t in self.documents])


class TextTask(Task[TextScores]):
    """Documents in windows, and their attacked forms in windows of the same words."""

    auto_class = AutoModelForCausalLM

    def __init__(self, settings: RobustnessSettings, store: Store) -> None:
        super().__init__(settings, store)
        self.settings = settings
        self.tokenizers = {role: load_tokenizer(*source) for role, source in self.sources.items()}
        models = list(self.models_under_test.values())
        self.block_size = settings.block_size or default_block_size(models)
        for model in models:
            check_context("eval", "clean text", self.block_size, self.block_size, model)
        self.corpus = prepare_corpus(settings)
        self.names = [document.name for document in self.corpus.documents]
        self.report = Perplexity(self.names)
        self._clean: dict[str, tuple[_Form, list[np.ndarray]]] = {}
        # Then a form is tokenized and aligned once, for the checks and the scores of all models.
        self._has_one_tokenizer = len(self.tokenizers) == 1 or _are_same(*self.tokenizers.values())
        # Kept until the last model has been scored. Two tokenizers keep none, to save memory.
        self._forms: dict[AttackCase | None, _Form] = {}
        self._untouched: dict[AttackCase, list[Untouched]] = {}
        for role in self.models_under_test:
            self._check_tokens(role)

    def _check_tokens(self, role: str) -> None:
        """Check that a model takes all forms, before any is scored.

        Raises:
            ConfigError: If a token is not in the model's vocabulary, or windows are longer than its context.
        """
        checkpoint, clean = self.models_under_test[role], self._form(role, None)
        longest: dict[AttackCase, int] = {}
        for case in (None, *self.cases):
            form = clean if case is None else self._form(role, case)
            checkpoint.check_vocabulary(max(form.highest, self._first(role)))
            if case is not None and self._may_be_long(role, case, clean, form):
                longest[case] = self._longest_window(role, case, clean, form)
        if longest:  # the case that needs the smallest windows of clean text
            case = max(longest, key=longest.__getitem__)
            check_context("eval", str(case), longest[case], self.block_size, checkpoint, under_attack=True)

    def _may_be_long(self, role: str, case: AttackCase, clean: _Form, attacked: _Form) -> bool:
        """Whether a window may be longer than a model's context. Windows that were scored before are not."""
        most = self.models_under_test[role].max_tokens
        if most is None or attacked.lengths.max() < most:  # a window is a part of a document, after one token
            return False
        return not self.is_stored(role, case, self._attacked_inputs(role, clean, attacked))

    def _longest_window(self, role: str, case: AttackCase, clean: _Form, attacked: _Form) -> int:
        """Return the number of tokens in the longest window of an attacked form.

        It is kept as soon as it is known, since aligning all forms may take long, and be interrupted.
        """

        def measure() -> dict[str, np.ndarray]:
            untouched = self._find_untouched(case, clean, attacked)
            longest = longest_attacked(clean.documents, attacked.documents, untouched, self.block_size)
            return {"longest": np.array(longest)}

        inputs = self._attacked_inputs(role, clean, attacked)
        return int(self.stored(role, case, inputs, measure, label=f"windows-{case}")["longest"])

    def score(self, role: str, case: AttackCase | None) -> TextScores:
        """Compute the likelihoods of the documents in one form.

        Raises:
            EvaluationError: If a likelihood is not finite.
        """
        form = self._form(role, case)
        if case is None:
            self._clean[role] = form.packed(), self._score_clean(role, form)
            sums = _clean_sums(form, self._clean[role][1])
        else:
            sums = self._score_attacked(role, case, form)
        documents = self.corpus.documents if case is None else self.corpus.attacked[case]
        if role == list(self.models_under_test)[-1]:  # no other model needs them
            self._forms.pop(case, None)
            if case is not None:
                self._untouched.pop(case, None)  # there are none of a form that was scored before
        return TextScores(
            num_tokens=form.lengths,
            num_words=np.array([len(document.text.split()) for document in documents]),
            num_bytes=np.array([num_bytes(document.text) for document in documents]),
            tokens=form.digest,
            **sums,
        )

    def _form(self, role: str, case: AttackCase | None) -> _Form:
        """Tokenize a form, once if there is one tokenizer."""
        if case in self._forms:
            return self._forms[case].unpacked()
        form = _tokenize(self.corpus.documents if case is None else self.corpus.attacked[case], self.tokenizers[role])
        if self._has_one_tokenizer:
            self._forms[case] = form.packed()
        return form

    def _score_clean(self, role: str, form: _Form) -> list[np.ndarray]:
        """Return the negative log-likelihood of each token, by document."""

        def measure() -> dict[str, np.ndarray]:
            windows = cut_clean(form.documents, self.block_size, self._first(role))
            return {"nll": np.concatenate(self._score(role, windows, f"Scoring {role}, clean"))}

        stored = self.stored(role, None, self._inputs(role, form), measure)
        return np.split(stored["nll"], np.cumsum(form.lengths)[:-1])

    def _score_attacked(self, role: str, case: AttackCase, attacked: _Form) -> dict[str, np.ndarray]:
        """Return the sums over the documents of an attacked form."""
        clean, clean_nll = self._clean[role]

        def measure() -> dict[str, np.ndarray]:
            before = clean.unpacked()
            untouched = self._find_untouched(case, before, attacked)
            windows = cut_attacked(before.documents, attacked.documents, untouched, self.block_size, self._first(role))
            nll = self._score(role, windows, f"Scoring {case}")
            pairs = list(zip(clean_nll, nll, untouched, strict=True))
            return {
                "nll": _sums(nll),
                "untouched_nll": _sums([values[kept.attacked] for _, values, kept in pairs]),
                "untouched_clean_nll": _sums([values[kept.clean] for values, _, kept in pairs]),
                "num_untouched": np.array([len(kept.clean) for kept in untouched]),
            }

        return self.stored(role, case, self._attacked_inputs(role, clean, attacked), measure)

    def _inputs(self, role: str, clean: _Form) -> dict[str, Any]:
        return {"first": self._first(role), "block_size": self.block_size, "clean": clean.digest}

    def _attacked_inputs(self, role: str, clean: _Form, attacked: _Form) -> dict[str, Any]:
        return {**self._inputs(role, clean), "attacked": attacked.digest}

    def _first(self, role: str) -> int:
        return first_token(self.tokenizers[role])

    def _find_untouched(self, case: AttackCase, clean: _Form, attacked: _Form) -> list[Untouched]:
        """Align a form with the clean one, once if there is one tokenizer."""
        if case in self._untouched:
            return self._untouched[case]
        pairs = list(zip(clean.documents, attacked.documents, strict=True))
        bar = tqdm(pairs, desc=f"Aligning {case}", unit=" documents", delay=2, disable=None)
        found = [Untouched(*(own.astype(np.int32) for own in find_untouched(before, after))) for before, after in bar]
        if self._has_one_tokenizer:
            self._untouched[case] = found
        return found

    def _score(self, role: str, windows: list[list[Tensor]], progress: str) -> list[np.ndarray]:
        checkpoint = self.models_under_test[role]
        by_name = dict(zip(self.names, windows, strict=True))
        return list(score_tokens(checkpoint.model, by_name, batch_size=self.batch_size, progress=progress).values())

    def describe(self, measured: Mapping[str, Measured[TextScores]]) -> dict[str, Any]:
        """Describe the documents and the share of words or letters that each attack changes."""
        clean = measured["model"].clean
        self._warn_about_unknown_words()
        return {
            "settings": dataclasses.asdict(self.settings) | {"block_size": self.block_size},
            "rates": {name: list(find_text_attack(name).rates) for name in self.settings.attacks or ()},
            "documents": {
                "source": self.corpus.source,
                "number": len(self.corpus.documents),
                "unit": "documents",
                "words": int(clean.num_words.sum()),
                "bytes": int(clean.num_bytes.sum()),
            },
        }

    def _warn_about_unknown_words(self) -> None:
        """Warn if one of two tokenizers has words that it does not know, which cost its model little."""
        if self._has_one_tokenizer:
            return
        for role, tokenizer in self.tokenizers.items():
            ids = np.concatenate([tokens.ids for tokens in self._clean[role][0].documents])
            share = float((ids == tokenizer.unk_token_id).mean()) if tokenizer.unk_token_id is not None else 0.0
            if share:
                warnings.warn(
                    f"eval: {share:.1%} of the tokens of `{self.models_under_test[role].source}` are "
                    f"{tokenizer.unk_token!r}, which is easier to predict than the words that the other model has to "
                    "spell: a comparison with it says little",
                    SymphonyWarning,
                    stacklevel=2,
                )


def _are_same(one: Any, other: Any) -> bool:
    """Whether two tokenizers surely give the same tokens: fast ones of one class, with the same file."""
    if type(one) is not type(other) or not one.is_fast:
        return False
    return bool(one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str())


def _tokenize(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> _Form:
    tokenized = tokenize(documents, tokenizer)
    digest = hashlib.sha256()
    for tokens in tokenized:
        unknown = "".join(f"{text}\0" for text in tokens.unknown.values())
        ids = np.array(tokens.ids, dtype=np.int64).tobytes()
        digest.update(hashlib.sha256(ids + unknown.encode(errors="surrogatepass")).digest())
    return _Form(tokenized, digest.hexdigest())


def _clean_sums(clean: _Form, nll: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the sums over clean documents, whose tokens are all untouched."""
    sums = _sums(nll)
    return {"nll": sums, "untouched_nll": sums, "untouched_clean_nll": sums, "num_untouched": clean.lengths}


def _sums(nll: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([values.sum(dtype=np.float64) for values in nll])
