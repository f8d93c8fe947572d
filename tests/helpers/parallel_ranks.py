"""What one of two processes does in test_parallel.py, and what one process alone does to compare with."""

import warnings

import torch
import transformers
from models import COMMON, CONFIGS, make_ids, move_graphs
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from symphony_hf import (
    FoldError,
    SymphonyWarning,
    expert_graphs,
    export_folded,
    fold,
    symphonize,
    unsymphonize,
    update_graphs,
)
from symphony_hf.experiments.distributed.loops import local_group

FAMILIES = {
    **{family: CONFIGS[family] for family in ("mixtral", "olmoe", "qwen3_moe")},
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "scoring_func": "sigmoid",  # which engines ask for
            "topk_method": "noaux_tc",
        },
    ),
}
# Ranks of "tensor" and "expert" share a batch, those of "data" have one each (and each its experts, from 5.23).
LAYOUTS = ("tensor", "expert")
SETTINGS = {"balance_loss_weight": 0.5, "z_loss_weight": 0.01, "decay": 0.9, "strength": 0.8}
STEPS = 2


def distributed_config(layout):
    has_ep_size = "ep_size" in DistributedConfig.__dataclass_fields__
    if layout == "tensor":
        return DistributedConfig(tp_size=2, tp_plan="auto")
    if layout == "expert":  # where there is an `ep_size`, 5.23 refuses expert parallelism without a plan for the rest
        return DistributedConfig(tp_size=2, **({"ep_size": 2} if has_ep_size else {"enable_expert_parallel": True}))
    return DistributedConfig(fsdp_size=2, **({"ep_size": 2} if has_ep_size else {}))


def make(family):
    torch.manual_seed(0)
    class_name, settings = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**{**COMMON, **settings}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("gate.weight", "router.weight")):
                tensor.mul_(20)  # far from ties, so that one rounding does not change who is chosen
            elif name.endswith(("router.bias", "e_score_correction_bias")):
                tensor.normal_(std=0.05)
    return model.eval()


def write_checkpoints(family, folder):
    make(family).save_pretrained(folder / "stock")
    move_graphs(symphonize(make(family), **SETTINGS)).save_pretrained(folder / "ours")


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone().contiguous()


@torch.no_grad()
def logits_of(model):
    return whole(model(make_ids(4, 12, seed=7)).logits)


def evaluate(model):
    """The logits, those of the routers, and the graphs."""
    with torch.no_grad():
        outputs = model(make_ids(4, 12, seed=7), output_router_logits=True)
    results = {"logits": whole(outputs.logits)}
    results |= {f"router.{i}": whole(logits) for i, logits in enumerate(getattr(outputs, "router_logits", None) or ())}
    return results | {f"graph.{name}": graph for name, graph in expert_graphs(model).items()}


def train(model):
    """Two optimizer steps, with padding: every loss and gradient, and the graphs after every step."""
    results = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    model.train()
    for step in range(STEPS):
        ids = make_ids(3, 9, seed=step)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        results[f"loss.{step}"] = whole(loss)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"grad.{step}.{name}"] = whole(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert update_graphs(model)
        results |= {f"graph.{step}.{name}": graph for name, graph in expert_graphs(model).items()}
    model.eval()
    return results | {"trained": logits_of(model)}


def run_family(folder, out, config=None):
    """All that is compared between one process and each of two: tensors by name, and checkpoints below `out`."""

    def load(name):
        return AutoModelForCausalLM.from_pretrained(folder / name, **({"distributed_config": config} if config else {}))

    loaded = load("ours")
    results = {f"loaded.{name}": value for name, value in evaluate(loaded).items()}
    for _ in range(2):  # again over what is there
        loaded.save_pretrained(out / "saved")
        export_folded(loaded, out / "folded")
    results |= {f"loaded.{name}": value for name, value in train(loaded).items()}
    patched = symphonize(load("stock"), graph=str(folder / "ours"), **SETTINGS)
    results |= {f"patched.{name}": value for name, value in evaluate(patched).items()}
    results |= {f"patched.{name}": value for name, value in train(patched).items()}
    others = symphonize(load("stock"), graph=str(folder / "ours"), router_gradient="neighbours", **SETTINGS)
    results |= {f"others.{name}": value for name, value in train(others).items()}
    results["folded"] = logits_of(fold(load("ours")))
    results["unsymphonized"] = logits_of(unsymphonize(symphonize(load("stock"))))
    results["unsymphonized_loaded"] = logits_of(unsymphonize(load("ours")))
    return results, loaded


def count_sharded(model):
    return sum(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def run_rank(rank, folder, families):
    torch.set_num_threads(1)
    warnings.simplefilter("error", SymphonyWarning)  # a router that was not run, say
    with local_group(rank, 2, folder / "rendezvous"):
        for family in families:
            for layout in LAYOUTS:
                results, model = run_family(folder / family, folder / family / layout, distributed_config(layout))
                assert count_sharded(model)
                save_file(results, folder / family / f"{layout}.{rank}.st")
        run_data_layout(rank, folder / "olmoe")


def run_data_layout(rank, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "ours", distributed_config=distributed_config("data"))
    assert hasattr(model.model.layers[0].mlp.gate.weight, "full_tensor")
    results = {"logits": logits_of(model)}
    for refuse in (lambda: export_folded(model, folder / "refused"), lambda: fold(model)):
        try:
            refuse()
        except FoldError as error:
            assert "partitioned" in str(error)  # noqa: PT017  # no pytest here
        else:
            raise AssertionError("folded what is partitioned")
    model.save_pretrained(folder / "data")
    ids = make_ids(4, 8)[2 * rank : 2 * rank + 2]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    update_graphs(model)
    save_file(results | {f"graph.{name}": graph for name, graph in expert_graphs(model).items()}, folder / f"{rank}.st")
