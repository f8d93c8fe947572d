"""`symphony ablate` as it is typed."""

import os
from types import SimpleNamespace

import pytest
import torch
from study_files import write_study
from typer.testing import CliRunner

from symphony_hf.cli import app
from symphony_hf.errors import ConfigError
from symphony_hf.experiments.ablation import run as run_module


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("SYMPHONY_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = write_study(tmp_path, "seeds: [0, 1]\naxes: {decay: [0.9]}")
    return lambda *options: CliRunner().invoke(app, ["ablate", str(path), "--output", str(tmp_path / "out"), *options])


def test_a_dry_run_prints_the_plan_and_its_time_and_trains_no_cell(run, tmp_path):
    result = run("--dry_run", "--set", "max_steps=20", "--workers", "2")
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines[0].startswith("5 points, 2 seeds: 10 runs of 640 tokens (20 steps); 0 are done")
    assert "waiting  smoe, decay 0.9, seed 1" in lines
    assert any(line.endswith("hours for 10 of them, 2 at a time") for line in lines)
    assert not (tmp_path / "out" / "cells").exists()


def test_settings_are_name_and_value(run):
    result = run("--dry_run", "--set", "max_steps")
    assert isinstance(result.exception, ConfigError)
    assert "NAME=VALUE" in str(result.exception)


def test_a_value_that_is_not_yaml_is_refused_with_its_name(run):
    result = run("--dry_run", "--set", "max_steps=[1")
    assert isinstance(result.exception, ConfigError)
    assert "--set max_steps: `[1` is not valid YAML" in str(result.exception)


def test_no_workers_are_refused(run):
    result = run("--workers", "0")
    assert isinstance(result.exception, ConfigError)
    assert "`workers` must be at least 1" in str(result.exception)


def test_a_dry_run_leaves_the_threads_and_the_seed_of_the_process(run):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        assert run("--dry_run").exit_code == 0
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_runs_have_one_thread_each_and_the_process_keeps_its_own(run, monkeypatch):
    class Process:
        def __init__(self, **_):
            self.threads = os.environ["OMP_NUM_THREADS"]

        def start(self):
            raise OSError(f"no process with {self.threads} thread")

    context = SimpleNamespace(set_forkserver_preload=lambda modules: None, Process=Process)
    monkeypatch.setattr(run_module.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "no process with 1 thread" in str(run().exception)
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_the_main_script_imports_is_imported_before_the_runs_are_forked(run, monkeypatch):
    """Each run imports it again, and finds there what the server has."""

    class Process:
        def __init__(self, **_):
            raise OSError("no process")

    preloaded = []
    context = SimpleNamespace(set_forkserver_preload=preloaded.extend, Process=Process)
    monkeypatch.setattr(run_module.multiprocessing, "get_context", lambda kind: context)
    assert "no process" in str(run().exception)
    assert {"symphony_hf.cli", "symphony_hf.cli.experiments", run_module.__name__} <= set(preloaded)
