"""A checkpoint whose routing is observed: of any class that transformers has for it."""

from ..anatomy.sources import empty_model, model_class_of
from ..errors import ConfigError
from ..robustness.subject import Subject
from ..watching import routers_to_watch


class RoutedSubject(Subject):
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

    def check_same_routers(self, other: "RoutedSubject") -> None:
        """Refuse another checkpoint that cannot be compared token by token and expert by expert.

        Raises:
            ConfigError: If its routers, experts or vocabulary are others.
        """
        sizes = [subject.config.get_text_config().vocab_size for subject in (self, other)]
        if self.routers != other.routers or sizes[0] != sizes[1]:
            raise ConfigError(
                f"routing: `{other.source}` has {_told(other.routers)} and {sizes[1]} tokens in its vocabulary, "
                f"`{self.source}` {_told(self.routers)} and {sizes[0]}: --against takes checkpoints of the same model"
            )


def _told(routers: dict[str, tuple[int, int]]) -> str:
    kinds = " and ".join(f"{top_k} of {experts}" for experts, top_k in sorted(set(routers.values())))
    return f"{len(routers)} routers that choose {kinds}"
