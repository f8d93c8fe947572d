"""Import path of the helpers in this folder, and a fixture of studies."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from study_files import write_study

from symphony_hf.experiments.ablation.study import load_study
from symphony_hf.experiments.ablation.text import prepare_streams


@pytest.fixture
def text(study, tmp_path):
    """The streams of a test file's `study`."""
    return prepare_streams(study, tmp_path / "out")


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    return lambda study="", **overrides: load_study(write_study(tmp_path, study), overrides)
