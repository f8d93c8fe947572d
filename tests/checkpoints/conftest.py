"""A Hub on the loopback, to which `huggingface_hub` and transformers are pointed for one test."""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import hub_server`

import huggingface_hub
import pytest
from hub_server import TOKEN, LoopbackHub
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from models import make_model, move_graphs
from pictures import without_graph_figures

from symphony_hf import symphonize


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """As HF_ENDPOINT would point to it, had it been set when the process started."""
    with LoopbackHub(TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Shared clients keep the endpoint of their first day.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # Xet's protocol is another server's; without it large files go by LFS.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        disable_progress_bars()
        yield server
        enable_progress_bars()


@pytest.fixture(autouse=True)
def _without_graph_figures(request):
    with contextlib.nullcontext() if "real_pictures" in request.fixturenames else without_graph_figures():
        yield


@pytest.fixture
def model():
    return move_graphs(symphonize(make_model("mixtral")))


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
