"""The one place that reads library versions, and that names the private things of transformers that we lean on.

Each of these is held by `tests/test_compat.py`, which fails when one moves:

- `PreTrainedModel.post_init` and `PreTrainedModel._initialize_weights(module, is_custom_code)`, wrapped in
  `patching/from_pretrained.py`
- `PreTrainedModel._can_record_outputs`, read in `patching/families/discovery.py`
- `PreTrainedModel._keep_in_fp32_modules_strict`, added to in `patching/symphonize.py`
- the tensor attribute `_is_hf_initialized`, which the loader sets on what it has loaded, read in
  `patching/from_pretrained.py`
"""

import contextlib
import importlib.metadata
import platform

import transformers
from packaging.version import Version

__version__ = "0.1.0"
OLDEST_TRANSFORMERS = "5.17.0"


def transformers_version() -> str:
    return transformers.__version__


def supported_range() -> str:
    """For error messages: what we support and what is installed."""
    return f"symphony_hf supports transformers >={OLDEST_TRANSFORMERS},<6 (installed {transformers.__version__})"


def transformers_is_supported() -> bool:
    return Version(OLDEST_TRANSFORMERS) <= Version(transformers.__version__) < Version("6")


def versions(*packages: str) -> dict[str, str]:
    """Versions for result files: symphony_hf, Python, torch, transformers, and others by name.

    Args:
        *packages: Names of further distributions. Those that are not installed are left out.
    """
    found = {"symphony_hf": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
