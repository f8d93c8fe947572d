"""Versions of libraries, and every private name of another library that this package uses.

`tests/test_compat.py` fails when a listed name moves, and when the package uses one that is not listed here.
"""

import contextlib
import importlib.metadata
import platform
from typing import NamedTuple

import transformers
from packaging.version import Version

__version__ = "0.1.0"
OLDEST_TRANSFORMERS = "5.17.0"
ENGINES = ("vllm", "sglang", "mergekit")
"""Libraries that read a config through transformers, and choose classes or tensor names of their own by it."""


def transformers_version() -> str:
    return transformers.__version__


def supported_range() -> str:
    """Return the supported and the installed versions of transformers, for error messages."""
    return f"symphony_hf supports transformers >={OLDEST_TRANSFORMERS},<6 (installed {transformers.__version__})"


def transformers_is_supported() -> bool:
    version = Version(transformers.__version__)
    # By the major version: 6.0.0.dev0 comes before 6.
    return Version(OLDEST_TRANSFORMERS) <= version and version.major < 6


def versions(*packages: str) -> dict[str, str]:
    """Return versions for result files: of symphony_hf, Python, torch, transformers and other packages.

    Args:
        *packages: Names of other distributions. Those that are not installed are omitted.
    """
    found = {"symphony_hf": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


class PrivateName(NamedTuple):
    """A private name of another library.

    Attributes:
        library: The library that defines it.
        rooms: Rooms of this package that use it.
        reason: Why no public name serves.
    """

    library: str
    rooms: tuple[str, ...]
    reason: str


def _hooks(*names: str) -> dict[str, PrivateName]:
    reason = "a copy of a module without its hooks, or whether it has any: hooks can only be added in public"
    return {name: PrivateName("torch", ("patching",), reason) for name in names}


def _of_trainer(*names: str) -> dict[str, PrivateName]:
    reason = "a checkpoint gets its name once it is whole: the documented callbacks run after that"
    return {name: PrivateName("transformers", ("training",), reason) for name in names}


def _of_online_trainers(*names: str) -> dict[str, PrivateName]:
    reason = "wrapped: the forwards that generate a batch of completions and score it, before any callback sees them"
    return {name: PrivateName("trl", ("training",), reason) for name in names}


PRIVATE_NAMES = {
    "_modules": PrivateName(
        "torch",
        ("conversion", "evaluation", "experiments", "patching"),
        "a child by its own name, also one that occurs twice: named_children leaves that out",
    ),
    "_parameters": PrivateName(
        "torch", ("conversion", "patching"), "a module's own parameters, those that are None too"
    ),
    "_buffers": PrivateName("torch", ("conversion", "patching"), "a module's own buffers, those that are None too"),
    **_hooks(
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ),
    "_apply": PrivateName(
        "torch",
        ("conversion", "patching"),
        "called by every cast and move: graphs stay float32, 4-bit experts are moved",
    ),
    "_save_to_state_dict": PrivateName(
        "torch", ("patching",), "the public pre-hook does not see the module's own storage in time"
    ),
    "_load_from_state_dict": PrivateName(
        "torch", ("patching",), "the public pre-hook cannot keep a refused tensor from being loaded"
    ),
    "_C": PrivateName("torch", ("patching",), "the way to `_functorch` and `_current_graph_task_id`"),
    "_current_graph_task_id": PrivateName("torch", ("patching",), "whether a backward pass is under way"),
    "_functorch": PrivateName("torch", ("patching",), "whether a transform of torch.func is running"),
    "_execution_engine": PrivateName("torch", ("patching",), "a callback at the end of the whole backward pass"),
    "_compiled_call_impl": PrivateName("torch", ("patching",), "whether `model.compile()` was called"),
    "_orig_mod": PrivateName("torch", ("patching",), "whether a module was wrapped by torch.compile"),
    "_get_active_ddp_module": PrivateName("torch", ("patching",), "the wrapper whose forward is under way"),
    "_is_replica": PrivateName("torch", ("patching",), "whether DataParallel copied a module into a thread"),
    "_join_config": PrivateName("torch", ("patching",), "whether that wrapper is inside `Join`"),
    "_grouped_mm": PrivateName("torch", ("training",), "an operator whose FLOPs the planner counts"),
    "_scaled_dot_product_flash_attention_for_cpu": PrivateName("torch", ("training",), "likewise"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": PrivateName("torch", ("training",), "likewise"),
    "_python_dispatch": PrivateName("torch", ("training",), "the module of TorchDispatchMode"),
    "_pytree": PrivateName("torch", ("training",), "the tensors in what an operator takes and returns"),
    "_initialize_weights": PrivateName(
        "transformers", ("patching",), "wrapped: called for each module after a checkpoint was loaded into the model"
    ),
    "_adjust_missing_and_unexpected_keys": PrivateName(
        "transformers", ("patching",), "wrapped: sees the tensors of a checkpoint that no module takes"
    ),
    "_dict_from_json_file": PrivateName(
        "transformers", ("patching",), "wrapped: the one place where a config's file becomes its values"
    ),
    "_is_hf_initialized": PrivateName(
        "transformers", ("conversion", "patching"), "set by the loader on what it has loaded"
    ),
    "_can_record_outputs": PrivateName(
        "transformers", ("conversion", "patching"), "the classes that a family names as its routers"
    ),
    "_keep_in_fp32_modules_strict": PrivateName(
        "transformers", ("experiments", "patching"), "what a loader keeps in float32"
    ),
    "_loss_function": PrivateName("transformers", ("patching",), "a loss function that was set on the instance"),
    "_experts_implementation": PrivateName(
        "transformers", ("experiments", "models"), "the implementation chosen for a model's experts"
    ),
    "_from_config": PrivateName(
        "transformers", ("experiments", "models"), "builds one class, with a dtype: only Auto classes have a public one"
    ),
    "_hf_peft_config_loaded": PrivateName("transformers", ("conversion",), "whether adapters are loaded"),
    "_is_quantized": PrivateName("transformers", ("conversion",), "a mark that a quantized load leaves in the config"),
    "_process_model_before_weight_loading": PrivateName(
        "transformers", ("conversion",), "overridden: the one moment at which a quantizer may change the model"
    ),
    **_of_trainer(
        *("_finalize_training", "_get_output_dir", "_load_best_model", "_load_from_checkpoint"),
        *("_push_from_checkpoint", "_save_checkpoint"),
    ),
    "_n_gpu": PrivateName("transformers", ("training",), "the number of GPUs that Trainer would use in one process"),
    **_of_online_trainers(
        "_generate_and_score_completions", "_generate_single_turn", "_get_per_token_logps_and_entropies"
    ),
    "_hf_hook": PrivateName("accelerate", ("patching",), "the device of an offloaded router"),
    "_old_forward": PrivateName("accelerate", ("patching",), "the forward that accelerate's hook calls"),
}
"""Each is held by a test of its name."""
