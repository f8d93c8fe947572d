"""Settings of `symphony routing`, and the checkpoints that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from symphony_hf.checkpoints.model_class import empty_model, model_class_of
from symphony_hf.errors import ConfigError
from symphony_hf.evaluation.checkpoint import ModelUnderTest
from symphony_hf.evaluation.settings import EvaluationSettings
from symphony_hf.settings import check_least

from .hooks import routers_to_watch


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(EvaluationSettings):
    """Checkpoints, text and attacks of routing diagnostics.

    Args:
        model: Checkpoint: a folder, or a name on the Hub; the latest one, where there are several.
        against: Earlier checkpoints of the same model, the earliest first.
        data: Text file, table, folder, or data set on the Hub to run the model on; by default the sources of the
            running Python's library.
        attacks: Attacks on text, as for `symphony eval`, or `none`.
        seed: Seed of the attacks.
        words: Approximate number of words read from each document's beginning; None for all.
        drop_first: Whether to measure the loss without each token's first expert.
        similarity_tokens: Number of tokens on which experts' outputs are compared; 0 to skip the comparison.
        tokenizer: Tokenizer of all checkpoints, where the model's folder has none.
        output: Folder for result.json, matrices.safetensors and the pictures.
    """

    against: Sequence[str] = ()
    text_column: str = "text"
    attacks: Sequence[str] = ("aaa",)
    severities: Sequence[int] = (1, 3, 5)
    seed: int = 0
    documents: int | None = 60
    words: int | None = 400
    drop_first: bool = True
    similarity_tokens: int = 256
    output: str = "symphony-routing"

    command: ClassVar[str] = "routing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.attacks)) < len(self.attacks):
            raise ConfigError(f"routing: `attacks` must differ from each other; got {list(self.attacks)}")
        check_least("routing", 1, words=self.words)
        if self.similarity_tokens and self.similarity_tokens < 4:
            raise ConfigError(f"routing: `similarity_tokens` must be 0, or at least 4; got {self.similarity_tokens}")

    @property
    def attack_seeds(self) -> Sequence[int]:
        """Seeds of the attacks."""
        return (self.seed,)


class RoutedModel(ModelUnderTest):
    """An MoE checkpoint whose weights are loaded on first use.

    `routers` has the number of experts and the experts per token of each router, by module name.

    Raises:
        ConfigError: If transformers does not know the model, or it is an adapter.
        UnsupportedModelError: If none of its routers is known.
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
                f"routing: `{other.source}` has {_describe(other.routers)} and {sizes[1]} tokens in its vocabulary, "
                f"`{self.source}` {_describe(self.routers)} and {sizes[0]}: --against takes checkpoints of the same "
                "model"
            )


def _describe(routers: dict[str, tuple[int, int]]) -> str:
    kinds = " and ".join(f"{top_k} of {experts}" for experts, top_k in sorted(set(routers.values())))
    return f"{len(routers)} routers that choose {kinds}"
