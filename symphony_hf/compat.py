"""Versions of libraries, and the private names of transformers that this package uses.

`tests/test_compat.py` fails when one of these names changes:

- `PreTrainedModel.post_init` and `PreTrainedModel._initialize_weights(module, is_custom_code)`, wrapped in
  `patching/from_pretrained.py`
- `PreTrainedModel._can_record_outputs`, read in `patching/families/discovery.py`
- `PreTrainedModel._keep_in_fp32_modules_strict`, added to in `patching/symphonize.py`
- the tensor attribute `_is_hf_initialized`, which the loader sets on loaded tensors, read in
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
    """Return the supported and the installed versions of transformers, for error messages."""
    return f"symphony_hf supports transformers >={OLDEST_TRANSFORMERS},<6 (installed {transformers.__version__})"


def transformers_is_supported() -> bool:
    return Version(OLDEST_TRANSFORMERS) <= Version(transformers.__version__) < Version("6")


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
