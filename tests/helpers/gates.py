"""Home-made MoE models, as remote code has them: the gate is an nn.Linear, and its block chooses."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB, HIDDEN, EXPERTS = 64, 16, 6


class LinearGateBlock(nn.Module):
    """LibMoE's form: a gate, a list of experts, top-k of the softmax."""

    def __init__(self, top_k=2):
        super().__init__()
        self.num_selected = top_k
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
        self.last_choice = None

    def scores(self, logits):
        return logits.softmax(-1)

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, HIDDEN)
        weights, self.last_choice = self.scores(self.gate(flat)).topk(self.num_selected, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        outputs = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, self.last_choice.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (weights.unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


class BiasedGateBlock(LinearGateBlock):
    """Chooses by something else than the gate's logits."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, EXPERTS))

    def scores(self, logits):
        return logits.sigmoid() + 3 * self.bias


class ArgmaxGateBlock(LinearGateBlock):
    """The best expert, and the best of the others: no top-k to be seen."""

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, HIDDEN)
        scores = self.gate(flat).softmax(-1)
        first = scores.argmax(-1)
        second = scores.scatter(1, first.unsqueeze(1), 0.0).argmax(-1)
        self.last_choice = torch.stack([first, second], dim=1)
        outputs = torch.stack([expert(flat) for expert in self.experts], dim=1)
        chosen = outputs.gather(1, self.last_choice.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (scores.gather(1, self.last_choice).unsqueeze(-1) * chosen).sum(1).view_as(hidden_states)


class TopKGate(nn.Module):
    """DeepSpeed's form, which MoE-LLaVA has: the gate reads the linear map's weight, and returns masks of places."""

    def __init__(self, top_k=2):
        super().__init__()
        self.wg = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.k = top_k
        self.last_choice = None

    def forward(self, flat):
        scores = F.linear(flat.float(), self.wg.weight.float()).softmax(-1)
        self.last_choice = scores.topk(self.k).indices
        mask = F.one_hot(self.last_choice, EXPERTS).sum(1)
        places = (mask.cumsum(0) - 1) * mask
        balance = (scores.mean(0) * mask.float().mean(0)).sum() * EXPERTS
        combine = (scores * mask).unsqueeze(-1) * F.one_hot(places, len(flat)) * mask.unsqueeze(-1)
        return balance, combine, combine.bool(), mask.sum(0)


class DispatchBlock(nn.Module):
    """A block around TopKGate: tokens are dispatched to places, and combined again."""

    def __init__(self, top_k=2):
        super().__init__()
        self.gate = TopKGate(top_k)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, HIDDEN)
        _, combine, dispatch, _ = self.gate(flat)
        inputs = torch.einsum("tec,td->ecd", dispatch.to(flat), flat)
        outputs = torch.stack([expert(x) for expert, x in zip(self.experts, inputs, strict=True)])
        return torch.einsum("tec,ecd->td", combine, outputs).view_as(hidden_states)


class HomeMadeConfig(PretrainedConfig):
    model_type = "home_made_moe"


class HomeMadeModel(PreTrainedModel):
    """A small language model of such blocks, as remote code would bring it."""

    config_class = HomeMadeConfig
    block_class = LinearGateBlock

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": self.block_class()}) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["moe"](hidden)
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class ModelOfTopKGates(HomeMadeModel):
    block_class = DispatchBlock


class ModelOfBiasedGates(HomeMadeModel):
    block_class = BiasedGateBlock


class ModelOfArgmaxGates(HomeMadeModel):
    block_class = ArgmaxGateBlock


class PlainModel(nn.Module):
    """The same without transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": LinearGateBlock()}) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["moe"](hidden)
        return self.head(hidden)


def make_home_made(model_class=HomeMadeModel, seed=0):
    torch.manual_seed(seed)
    model = model_class(HomeMadeConfig()) if issubclass(model_class, PreTrainedModel) else model_class()
    return model.eval()
