"""Fixtures that every test may use. The tiny models are in helpers/models.py.

Fixtures import torch and the like when they run: xdist's controller loads this file, too, before it starts any worker.
"""

import gc
import importlib.metadata
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tiny models gain nothing from threads, and beside other processes these wait for one another. For the processes
# that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # so that tests can `import models`

import hypothesis
import pytest
from packaging.version import Version

# No deadline, because a busy machine is no failure; and the same examples in every run.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Exempt the objects that imports and collection create from garbage collections, which each Trainer forces."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _grey_pictures():
    """Build each figure, and save it as one grey point. Tests of the pictures request `real_pictures`."""
    import pictures
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", pictures.save_point)
        yield


@pytest.fixture
def real_pictures(_grey_pictures, monkeypatch):
    """Figures as users see them."""
    import pictures
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", pictures.save)


@pytest.fixture(params=["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def family(request):
    from models import CONFIGS

    assert request.param in CONFIGS
    return request.param


@pytest.fixture(scope="session")
def embedded():
    """The corpus of the running Python's own library."""
    from symphony_hf.data.embedded import embedded_corpus

    return embedded_corpus()


@pytest.fixture(scope="session")
def shared_runs(tmp_path_factory):
    from small_runs import SharedRuns

    root = tmp_path_factory.getbasetemp()
    return SharedRuns((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared")


@pytest.fixture(scope="session")
def plain_python(tmp_path_factory):
    """Run code in a process that has imported transformers, and not us."""
    from plain_python import PlainPython

    with PlainPython(tmp_path_factory.mktemp("plain_python")) as server:
        yield server.run


@pytest.fixture
def disk_that_fills(monkeypatch):
    """Texts get half of their letters onto the disk."""
    write = Path.write_text

    def fail(path, text, *arguments, **settings):
        write(path, text[: len(text) // 2], *arguments, **settings)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)


@pytest.fixture
def native_adapters(monkeypatch):
    """For `model.add_adapter`, transformers' own integration of PEFT.

    A release of it may ask for one of PEFT that is yet to come (5.24 asks for 0.22, with 0.21.2 the newest), and refuse
    what runs: then the installed one is let through, and what it does is tested all the same.
    """
    from transformers.integrations import peft as integration

    installed = importlib.metadata.version("peft")
    if Version(installed) < Version(integration.MIN_PEFT_VERSION):
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", installed)
