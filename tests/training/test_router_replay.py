"""with_router_replay: GRPO trains its completions by the experts that sampled them."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import COMMON, make_model
from trainers import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer

from symphony_hf import (
    ConfigError,
    PatchError,
    SymphonyCallback,
    expert_graphs,
    symphonize,
    with_router_losses,
    with_router_replay,
)
from symphony_hf.patching.attachment import tracker_of
from symphony_hf.patching.replay.hooks import decoder_routers
from symphony_hf.routing import initial_adjacency
from symphony_hf.training.callback import refuse_vllm

RECIPE = Path(__file__).parents[2] / "recipes" / "olmoe-7b-grpo" / "train.py"
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "num_iterations": 2,  # each batch is used by two steps, so old log-probabilities are computed
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


class RatioTrainer(GRPOTrainer):
    """Notes the ratio of new to old probabilities of each training forward."""

    def compute_loss(self, model, inputs, **kwargs):
        self.batch = inputs
        return super().compute_loss(model, inputs, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            log_ratio = found[0].detach() - self.batch["old_per_token_logps"]
            self.ratios.append(log_ratio.exp()[self.batch["completion_mask"].bool()])
        return found


def make_noisy_model():
    """DeepSeek-V3 in bfloat16, with noise of a rounding in the scores by which it chooses, and not in its weights."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    noise = torch.Generator().manual_seed(0)

    def shake(router, args):
        router.e_score_correction_bias.copy_(torch.randn(8, generator=noise) * 2**-8)

    for router in decoder_routers(model):
        router.module.register_forward_pre_hook(shake)
    return model


def train(trainer_class, model, tmp_path, **settings):
    callbacks = [SymphonyCallback()] if hasattr(model, "_symphony_tracker") else []
    trainer = trainer_class(
        model,
        args=GRPOConfig(output_dir=str(tmp_path), **{**QUIET, **settings}),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": "5 6 7 "}, {"prompt": "8 "}] * 4),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )
    trainer.ratios = []
    trainer.train()
    return trainer


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one_under_routing_noise(checkpointing, tmp_path):
    replayed = train(
        with_router_replay(RatioTrainer), make_noisy_model(), tmp_path, gradient_checkpointing=checkpointing
    )
    first, second = replayed.ratios
    assert torch.equal(first, torch.ones_like(first))
    assert not torch.equal(second, torch.ones_like(second))  # the policy has moved
    if not checkpointing:
        free = train(RatioTrainer, make_noisy_model(), tmp_path, gradient_checkpointing=False)
        assert (free.ratios[0] != 1).any()


@pytest.mark.filterwarnings("ignore")
def test_it_combines_with_router_losses_and_graphs(tmp_path):
    """After several turns, as with tools, the choices are those of the forward that scores."""

    class SeveralTurns(RatioTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            self._router_replay.generated.append(None)
            return super()._generate_single_turn(*args, **kwargs)

    model = symphonize(make_model(experts="eager"), decay=0.5)
    before = expert_graphs(model)
    trainer = train(with_router_losses(with_router_replay(SeveralTurns)), model, tmp_path)
    assert torch.equal(trainer.ratios[0], torch.ones_like(trainer.ratios[0]))
    assert all(not torch.equal(graph, before[name]) for name, graph in expert_graphs(model).items())
    assert any("symphony/balance_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_trains_and_saves_its_graphs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--smoke"])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert "'reward': " in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/smoke/olmoe-7b-grpo/final")
    start = initial_adjacency(8, 2)
    assert all((graph - start).abs().max() > 1e-3 for graph in expert_graphs(trained).values())


def test_the_reward_of_the_recipe_falls_with_the_distance():
    script = runpy.run_path(str(RECIPE))
    assert script["closeness"]([" 42", "41.", "so", "9 42"], [42] * 4) == [1, 1 / 2, 0, 1 / 34]
    rows = script["additions"](3, seed=0)
    assert [eval(row["prompt"].rstrip(" =")) for row in rows] == rows["answer"]


def begin_with_the_callback(model, arguments):
    SymphonyCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


def generate_with_replay(model, arguments):
    trainer = object.__new__(with_router_replay(GRPOTrainer))
    trainer.model, trainer.args = model, arguments
    trainer._generate_and_score_completions([])


@pytest.mark.parametrize("begin", [begin_with_the_callback, generate_with_replay])
def test_completions_of_vllm_are_refused_where_the_graphs_would_be_missing(begin, tmp_path):
    """TRL sends vLLM the model's parameters, and the graphs are buffers."""
    arguments = GRPOConfig(output_dir=str(tmp_path), **QUIET)
    arguments.use_vllm = True
    with pytest.raises(PatchError, match="use_vllm=True samples completions without the graphs"):
        begin(symphonize(make_model("mixtral")), arguments)


def test_a_model_that_routes_without_its_graphs_may_sample_in_vllm(tmp_path):
    arguments = GRPOConfig(output_dir=str(tmp_path), **QUIET)
    arguments.use_vllm = True
    refuse_vllm(arguments, tracker_of(symphonize(make_model("mixtral"), strength=0)), "GRPO")


def test_only_online_trainers_are_accepted():
    with pytest.raises(ConfigError, match="without _generate_single_turn"):
        with_router_replay(Trainer)
    assert with_router_replay(GRPOTrainer).__name__ == "GRPOTrainer"
