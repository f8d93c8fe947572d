"""Fixtures that every test may use. The tiny models are in models.py."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tiny models gain nothing from threads, and beside other processes these wait for one another. For the processes
# that tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that tests can `import models`

import pytest
import torch
from models import CONFIGS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=sorted(CONFIGS))
def family(request):
    return request.param
