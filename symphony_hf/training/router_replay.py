"""Router replay in TRL's online trainers: a sequence is trained by the experts by which it was sampled."""

import functools
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor
from transformers import Trainer

from symphony_hf.errors import ConfigError
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.replay.choices import RoutingChoices
from symphony_hf.patching.replay.contexts import record_routing, replay_routing
from symphony_hf.patching.symphonize import is_symphonized

from .callback import refuse_vllm

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])

_KEY = "routing_choices"
"""Key of the choices in a trainer's batches, with the sequences first: batches are shuffled and split by them."""

_METHODS = ("_generate_single_turn", "_generate_and_score_completions", "_get_per_token_logps_and_entropies")


def with_router_replay(trainer_class: TrainerClass) -> TrainerClass:
    """Return a trainer class that trains each completion by the experts that were chosen when it was sampled.

        trainer = with_router_replay(GRPOTrainer)(model, args=..., reward_funcs=..., train_dataset=...)

    Where transformers generates the completions in one turn, the choices are recorded then. Otherwise (vLLM, continuous
    batching, tools) they are recorded when the policy's old log-probabilities are computed. Both the old
    log-probabilities and every training forward replay them. A trainer that computes no old log-probabilities trains
    on-policy, where the ratio is 1 by definition; then there is nothing to replay but what was generated.

    Args:
        trainer_class: GRPOTrainer of TRL, or one that is built like it. Combines with `with_router_losses`.

    Returns:
        A subclass with the same name.

    Raises:
        ConfigError: If it is not such a class.
        PatchError: In training, if a symphonized model would sample in vLLM.
    """
    missing = [name for name in _METHODS if not hasattr(trainer_class, name)]
    if not isinstance(trainer_class, type) or not issubclass(trainer_class, Trainer) or missing:
        raise ConfigError(
            "with_router_replay: expected a trainer class built like TRL's GRPOTrainer, got "
            f"{trainer_class!r}, without {', '.join(missing) or 'being one'}: use `record_routing` and "
            "`replay_routing` in its loop"
        )

    def generate_single_turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if self.model.training and not (self.use_vllm or self.use_transformers_continuous_batching):
                self._router_replay.generated.append(stack.enter_context(record_routing(self.model_wrapped)))
            return trainer_class._generate_single_turn(self, *args, **kwargs)  # type: ignore[attr-defined]

    def generate_and_score(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_symphonized(self.model):
            refuse_vllm(self.args, tracker_of(self.model), "with_router_replay")
        self._router_replay = _Rollout(is_training=self.model.training)
        output = trainer_class._generate_and_score_completions(self, *args, **kwargs)  # type: ignore[attr-defined]
        rollout, self._router_replay = self._router_replay, None
        choices = rollout.choices(len(output["completion_ids"]))
        if choices is not None:
            output[_KEY] = choices.experts.transpose(0, 1).to(output["completion_ids"].device)
            self._replayed_routers = (choices.routers, choices.num_experts)
        return output

    def log_probs(self: Any, model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            rollout = getattr(self, "_router_replay", None)
            if rollout is not None and _is_policy(self, model):
                rollout.enter(stack, model, len(input_ids))
            return trainer_class._get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs)  # type: ignore[attr-defined]

    @functools.wraps(trainer_class.compute_loss)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        experts: Tensor | None = inputs.get(_KEY)
        with ExitStack() as stack:
            if experts is not None:
                choices = RoutingChoices(experts.transpose(0, 1), *self._replayed_routers)
                stack.enter_context(replay_routing(model, choices))
            return trainer_class.compute_loss(self, model, inputs, *args, **kwargs)

    namespace = {
        "_generate_single_turn": functools.wraps(trainer_class._generate_single_turn)(generate_single_turn),  # type: ignore[attr-defined]
        "_generate_and_score_completions": generate_and_score,
        "_get_per_token_logps_and_entropies": log_probs,
        "compute_loss": compute_loss,
        "__module__": trainer_class.__module__,
        "__doc__": trainer_class.__doc__,
    }
    return type(trainer_class.__name__, (trainer_class,), namespace)  # type: ignore[return-value]


class _Rollout:
    """Choices of the completions that a trainer is generating and scoring.

    Attributes:
        generated: Choices of each call that generates; several where tools give the model more to read.
        scored: Choices of the forwards that computed the old log-probabilities, if they were recorded.
    """

    def __init__(self, is_training: bool) -> None:
        self.is_training = is_training
        self.generated: list[RoutingChoices] = []
        self.scored: RoutingChoices | None = None

    def choices(self, num_sequences: int) -> RoutingChoices | None:
        """Return the choices of all completions; None if they were not recorded."""
        found = (*(self.generated if len(self.generated) == 1 else ()), self.scored)
        return next((choices for choices in found if choices is not None and len(choices) == num_sequences), None)

    def enter(self, stack: ExitStack, model: Any, num_sequences: int) -> None:
        """Replay what was generated while the policy scores it, or record what it chooses then."""
        known = self.choices(num_sequences)
        if known is not None:
            stack.enter_context(replay_routing(model, known))
        elif self.is_training:
            self.scored = stack.enter_context(record_routing(model))


def _is_policy(trainer: Any, model: Any) -> bool:
    """Whether a model is the policy, and not the reference: another model, or this one with its adapters off."""
    if model is getattr(trainer, "ref_model", None):
        return False
    return not any(
        getattr(module, "disable_adapters", False) is True
        or (hasattr(module, "peft_config") and getattr(module, "active_adapter", None) == "ref")
        for module in model.modules()
    )
