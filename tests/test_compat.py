"""Every private name of another library that the package uses is listed in compat.py, and is where we look for it."""

import inspect

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import make_model
from private_names import private_names_by_room
from torch import nn
from torch.autograd import Variable
from torch.distributed.algorithms.join import Joinable
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.quantizers.base import HfQuantizer
from transformers.utils.output_capturing import OutputRecorder
from trl import GRPOTrainer

import symphony_hf
from symphony_hf import compat
from symphony_hf.compat import PRIVATE_NAMES, supported_range, transformers_is_supported


class Joined(Joinable):
    join_hook = join_device = join_process_group = None

    def __init__(self):
        super().__init__()


def model_with_a_loss():
    model = make_model()
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    return model


HOLDERS = {
    "_C": lambda: torch,
    "_functorch": lambda: torch._C,
    "_current_graph_task_id": lambda: torch._C,
    "_execution_engine": lambda: Variable,
    "_get_active_ddp_module": lambda: DistributedDataParallel,
    "_is_replica": lambda: torch.nn.Linear(1, 1)._replicate_for_data_parallel(),
    "_join_config": Joined,
    "_grouped_mm": lambda: torch,
    "_scaled_dot_product_flash_attention_for_cpu": lambda: torch.ops.aten,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda: torch.ops.aten,
    "_python_dispatch": lambda: torch.utils,
    "_pytree": lambda: torch.utils,
    "_orig_mod": lambda: torch.compile(nn.Linear(1, 1), backend="eager"),
    **dict.fromkeys(
        ("_generate_and_score_completions", "_generate_single_turn", "_get_per_token_logps_and_entropies"),
        lambda: GRPOTrainer,
    ),
    "_n_gpu": lambda: TrainingArguments("unused", use_cpu=True, report_to=[]),
    "_loss_function": model_with_a_loss,
    "_experts_implementation": lambda: make_model().config,
    "_process_model_before_weight_loading": lambda: HfQuantizer,
    "_dict_from_json_file": lambda: PreTrainedConfig,
    **dict.fromkeys(("_hf_hook", "_old_forward"), lambda: add_hook_to_module(nn.Linear(1, 1), ModelHook())),
    **dict.fromkeys(
        (
            *("_finalize_training", "_get_output_dir", "_load_best_model", "_load_from_checkpoint"),
            *("_push_from_checkpoint", "_save_checkpoint"),
        ),
        lambda: Trainer,
    ),
}
"""Where a name is, if that is not an nn.Module or PreTrainedModel."""


MARKS = {"_is_hf_initialized", "_is_quantized"}
"""Set while something is loaded or quantized: each has a test of its own."""


@pytest.mark.parametrize("name", sorted(PRIVATE_NAMES.keys() - MARKS))
def test_a_private_name_is_where_we_look_for_it(name):
    default = {"torch": nn.Module, "transformers": lambda: PreTrainedModel}.get(PRIVATE_NAMES[name].library)
    assert hasattr(HOLDERS.get(name, default)(), name)


def test_every_private_name_in_use_is_listed_and_no_other():
    used = {name: tuple(sorted(rooms)) for name, rooms in private_names_by_room().items()}
    assert used == {name: entry.rooms for name, entry in PRIVATE_NAMES.items()}


def test_the_mark_of_a_quantized_load_is_not_saved():
    config = make_model().config
    config._is_quantized = True
    assert "_is_quantized" not in config.to_dict()


def test_what_private_functions_do():
    assert torch._C._functorch.peek_interpreter_stack() is None
    seen = []
    torch.func.grad(lambda x: (seen.append(torch._C._functorch.peek_interpreter_stack()), x)[1])(torch.ones(()))
    assert seen[0] is not None
    order, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: Variable._execution_engine.queue_callback(lambda: order.append("end")))
    (x * 2).register_hook(lambda _: order.append("middle"))
    x.sum().backward()
    assert order == ["end"]
    tasks = []
    x.register_hook(lambda _: tasks.append(torch._C._current_graph_task_id()))
    x.sum().backward()
    assert tasks[0] != -1
    assert torch._C._current_graph_task_id() == -1


def test_the_installed_version_is_one_that_we_support():
    assert transformers_is_supported(), supported_range()


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("5.16.9", False), ("5.17.0", True), ("5.99.0.dev0", True), ("6.0.0.dev0", False), ("6.0.0rc1", False)],
)
def test_versions_before_and_after_the_range_are_not(version, is_supported, monkeypatch):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    assert transformers_is_supported() is is_supported


def test_the_wrapped_methods_have_the_signatures_that_we_wrap():
    post_init = inspect.unwrap(PreTrainedModel.post_init)
    initialize = inspect.unwrap(PreTrainedModel._initialize_weights)
    adjust = inspect.unwrap(PreTrainedModel._adjust_missing_and_unexpected_keys)
    assert list(inspect.signature(adjust).parameters) == ["self", "loading_info"]
    assert list(inspect.signature(post_init).parameters) == ["self"]
    assert list(inspect.signature(initialize).parameters) == ["self", "module", "is_custom_code"]


def test_the_wraps_are_installed_once():
    before = PreTrainedModel.post_init
    symphony_hf.patching.from_pretrained.install_loading_wraps()
    assert PreTrainedModel.post_init is before
    assert not hasattr(inspect.unwrap(before), "_symphony_wrap")


def test_routers_are_declared_by_the_model_class():
    declared = make_model("olmoe").model._can_record_outputs["router_logits"]
    assert isinstance(declared, OutputRecorder)
    assert declared.index == 0
    assert declared.target_class.__name__ == "OlmoeTopKRouter"


def test_the_loader_flags_what_it_loaded(tmp_path):
    make_model("olmoe").save_pretrained(tmp_path)
    loaded = type(make_model("olmoe")).from_pretrained(tmp_path)
    assert loaded.model.layers[0].mlp.gate.weight._is_hf_initialized


def test_strictly_float32_modules_are_a_set_by_name(tmp_path):
    model = make_model("olmoe")
    assert isinstance(model._keep_in_fp32_modules_strict, set)
    model.save_pretrained(tmp_path)

    class Strict(type(model)):
        _keep_in_fp32_modules_strict = {"lm_head"}

    assert Strict.from_pretrained(tmp_path, dtype=torch.bfloat16).lm_head.weight.dtype == torch.float32


def test_the_loss_function_can_be_set_on_an_instance():
    model = make_model("olmoe")
    model.loss_function = lambda *args, **kwargs: torch.tensor(7.0)
    ids = torch.tensor([[3, 4, 5]])
    assert model(ids, labels=ids).loss == 7.0
    assert make_model("olmoe")(ids, labels=ids).loss != 7.0
