"""What is observed: which models, which text, which attacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from symphony_hf.checkpoints.model_class import empty_model, model_class_of
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.robustness.settings import RobustnessSettings

from .hooks import routers_to_watch


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """Which model, beside which of its checkpoints, on which text.

    Args:
        model: Checkpoint: a folder, or a name on the Hub; the latest one, where there are several.
        against: Earlier checkpoints of the same model, the earliest first.
        data: Text file, table, folder, or data set on the Hub to run the model on; by default the sources of the
            running Python's library.
        split: Split of the data: train, validation, test or all. By default all of a single file, and otherwise the
            test split.
        text_column: Text column of a table.
        attacks: Attacks on text, as for `symphony eval`; may be empty.
        severities: Severities of the attacks, from 1 to 5.
        seed: Seed of the attacks.
        documents: Maximum number of documents, spread evenly over all; None for all.
        words: Approximate number of words read from each document's beginning; None for all.
        block_size: Number of tokens in a window of clean text; by default a quarter of the model's context length, at
            most 1024.
        batch_size: Number of windows in a batch.
        drop_first: Whether to measure the loss without each token's first expert.
        similarity_tokens: Number of tokens on which experts' outputs are compared; 0 to skip the comparison.
        dtype: Data type of the weights: auto (as stored), float32, bfloat16 or float16.
        tokenizer: Tokenizer of all checkpoints, where the model's folder has none.
        revision: Branch, tag or commit of the model on the Hub.
        output: Folder for result.json, matrices.safetensors and the pictures.
    """

    model: str
    against: Sequence[str] = ()
    data: str | None = None
    split: str | None = None
    text_column: str = "text"
    attacks: Sequence[str] = ("aaa",)
    severities: Sequence[int] = (1, 3, 5)
    seed: int = 0
    documents: int | None = 60
    words: int | None = 400
    block_size: int | None = None
    batch_size: int = 8
    drop_first: bool = True
    similarity_tokens: int = 256
    dtype: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    output: str = "symphony-routing"

    def __post_init__(self) -> None:
        self.as_evaluation()
        if self.words is not None and self.words < 1:
            raise ConfigError(f"routing: `words` must be at least 1, got {self.words}")
        if self.similarity_tokens and self.similarity_tokens < 4:
            raise ConfigError(f"routing: `similarity_tokens` must be 0, or at least 4; got {self.similarity_tokens}")

    def as_evaluation(self) -> RobustnessSettings:
        """The part of it that `symphony eval` has, too; without attacks, with one that is not made use of.

        Raises:
            ConfigError: If a setting is none.
        """
        return _Evaluation(
            model=self.model,
            data=self.data,
            split=self.split,
            text_column=self.text_column,
            attacks=tuple(self.attacks) or ("aaa",),
            severities=tuple(self.severities),
            seeds=(self.seed,),
            documents=self.documents,
            block_size=self.block_size,
            batch_size=self.batch_size,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            revision=self.revision,
            output=self.output,
        )


@dataclass(frozen=True, kw_only=True)
class _Evaluation(RobustnessSettings):
    """Settings of another command, which its messages name."""

    command: ClassVar[str] = "routing"


class RoutedModel(ModelUnderTest):
    """A mixture of experts, of which the weights are read when they are first asked for.

    Args:
        source: A folder, or a name on the Hub.
        revision: On the Hub.
        dtype: Of the weights; auto: as they are stored.

    Attributes:
        routers: By module name, (number of experts, experts per token).

    Raises:
        ConfigError: If it is no model that transformers knows, or an adapter.
        UnsupportedModelError: If it has no routers that are known.
    """

    def __init__(self, source: str, revision: str | None, dtype: str) -> None:
        super().__init__(source, revision, dtype)
        self.auto_class = model_class_of(self.config, source)
        watched = routers_to_watch(empty_model(source, revision))
        self.routers = {name: (router.contract.num_experts, router.contract.top_k) for name, router in watched.items()}

    def check_same_routers(self, other: "RoutedModel") -> None:
        """Refuse another checkpoint that cannot be compared token by token and expert by expert.

        Raises:
            ConfigError: If its routers, experts or vocabulary are others.
        """
        sizes = [checkpoint.config.get_text_config().vocab_size for checkpoint in (self, other)]
        if self.routers != other.routers or sizes[0] != sizes[1]:
            raise ConfigError(
                f"routing: `{other.source}` has {_told(other.routers)} and {sizes[1]} tokens in its vocabulary, "
                f"`{self.source}` {_told(self.routers)} and {sizes[0]}: --against takes checkpoints of the same model"
            )


def _told(routers: dict[str, tuple[int, int]]) -> str:
    kinds = " and ".join(f"{top_k} of {experts}" for experts, top_k in sorted(set(routers.values())))
    return f"{len(routers)} routers that choose {kinds}"
