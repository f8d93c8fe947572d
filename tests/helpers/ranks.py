"""What one of two processes does in test_distributed.py: a module of its own, which a spawned process can import."""

import json
import warnings

import torch
import torch.distributed as dist
from models import gradients, llava_inputs, make_ids, make_llava, make_model, move_graphs
from safetensors.torch import save_file
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from symphony_hf import PatchError, SymphonyWarning, expert_graphs, symphonize, upcycle_modules, update_graphs
from symphony_hf.experiments.conformance.tiny import tiny_model
from symphony_hf.experiments.distributed.loops import local_group

STEPS = 3


def messages_of_ranks_that_differ(rank):
    """What is said where the second rank has two experts of one graph in another order."""
    model = move_graphs(symphonize(make_model())).train()
    if rank == 1:
        graph = model.model.layers[1].mlp.gate.symphony
        order = torch.tensor([1, 0, *range(2, graph.num_experts)])
        graph.adjacency.copy_(graph.adjacency[order][:, order])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            ids = make_ids(seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            update_graphs(model)
    return [str(warning.message) for warning in caught if issubclass(warning.category, SymphonyWarning)]


def train(rank):
    """Graphs and gradients after STEPS steps under DistributedDataParallel."""
    reduces = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reduces.append(args[1:]) or original(*args, **kwargs)
    model = symphonize(make_model(), balance_loss_weight=0.0, decay=0.9).train()
    update_graphs(model)
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        ids = make_ids(4, 8, seed=step)[2 * rank : 2 * rank + 2]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        assert update_graphs(wrapped)
    # One for all layers, each step; and, every hundred steps from the first on, a look at whether the ranks agree.
    assert reduces == [(dist.ReduceOp.MAX,), *[()] * STEPS]
    dist.all_reduce = original
    return {**expert_graphs(model), **{f"grad.{n}": g for n, g in gradients(model).items()}}


def move_biases(rows_of, wrap=lambda model: model):
    """Correction biases after STEPS steps; `rows_of` gives this process its part of each batch."""
    torch.manual_seed(0)
    model = symphonize(tiny_model("deepseek_v3"), balance="bias", bias_rate=0.125).train()
    wrapped = wrap(model)
    for step in range(STEPS):
        ids = rows_of(make_ids(4, 8, seed=step))
        wrapped(input_ids=ids, labels=ids).loss.backward()
        assert update_graphs(wrapped)
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def refusal_of_join(rank):
    """What is said where the second rank has fewer batches, and torch's Join would make up for them."""
    wrapped = DistributedDataParallel(symphonize(make_model()).train())
    try:
        with Join([wrapped]):
            for step in range(2 - rank):
                ids = make_ids(seed=step)
                wrapped(input_ids=ids, labels=ids).loss.backward()
                update_graphs(wrapped)
    except PatchError as error:
        return str(error)
    return None


def make_routed_tower():
    """A LLaVA whose one graph is in its vision tower, which a batch of text alone leaves out."""
    model = upcycle_modules(make_llava(vision_layers=5), "*vision_tower*.3.mlp")
    return symphonize(model, layers=[3], decay=0.5).train()


def learn_of_images(inputs_of):
    """The graph of a vision tower after STEPS steps. The loop forgets one commit, which the next forward makes up."""
    model = make_routed_tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing moved the graphs")
        for step in range(STEPS):
            inputs = inputs_of(step)
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            assert step == 1 or update_graphs(model)
    return expert_graphs(model)


def learn(model, rows_of):
    """A learned graph after STEPS steps, whole; `rows_of` gives this process its part of each batch."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
    for step in range(STEPS):
        ids = rows_of(make_ids(4, 8, seed=step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert update_graphs(model)
    return expert_graphs(model)


def learned_model():
    model = symphonize(make_model(), graph="learned", balance_loss_weight=0.0, z_loss_weight=0.0)
    return move_graphs(model)


def learn_under_fsdp2(rank, folder):
    """Each rank holds half of every graph between forwards. Saves what was learned, and the whole state dict."""
    model = learned_model()
    for module in (*model.model.layers, model):
        fully_shard(module)
    assert hasattr(model.model.layers[0].mlp.gate.symphony.adjacency, "full_tensor")
    graphs = learn(model, lambda ids: ids[2 * rank : 2 * rank + 2])
    save_file(graphs, folder / f"learned.{rank}.st")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        save_file(state, folder / "state.st")


def run_rank(rank, folder):
    torch.set_num_threads(1)
    with local_group(rank, 2, folder / "rendezvous"):
        save_file(train(rank), folder / f"{rank}.st")
        biases = move_biases(lambda ids: ids[2 * rank : 2 * rank + 2], DistributedDataParallel)
        save_file(biases, folder / f"biases.{rank}.st")
        messages = messages_of_ranks_that_differ(rank)
        (folder / f"{rank}.json").write_text(json.dumps([*messages, refusal_of_join(rank)]))
        learn_under_fsdp2(rank, folder)
        images = learn_of_images(lambda step: {"input_ids": make_ids(seed=step)} if rank else llava_inputs(seed=step))
        save_file(images, folder / f"images.{rank}.st")
