"""The private parts of transformers that we lean on: each test fails when one moves."""

import inspect

import torch
from models import make_model
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

import symphony_hf
from symphony_hf.compat import supported_range, transformers_is_supported


def test_the_installed_version_is_one_that_we_support():
    assert transformers_is_supported(), supported_range()


def test_the_wrapped_methods_have_the_signatures_that_we_wrap():
    post_init = inspect.unwrap(PreTrainedModel.post_init)
    initialize = inspect.unwrap(PreTrainedModel._initialize_weights)
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
