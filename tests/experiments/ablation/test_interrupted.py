"""The whole command, stopped by a signal that nothing can catch, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from study_files import write_study

STUDY = "seeds: [0, 1]\nsystems: [smoe, glam]"
RUNS = 12


def command(folder, *options):
    path = folder / "study.yaml"
    arguments = ["-m", "symphony_hf.cli", "ablate", str(path), "--output", str(folder / "out"), *options]
    environment = {
        **os.environ,
        "SYMPHONY_HF_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    return [sys.executable, *arguments], environment


def change_recipe(folder, old, new):
    recipe = folder / "recipe.yaml"
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))


def cells(folder):
    return {path.name: path for path in (folder / "out" / "cells").glob("[!.]*.json")}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(900)  # three processes that import everything, and as many servers that fork their runs
def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for folder in (stopped, whole):
        write_study(folder, STUDY)
    arguments, environment = command(stopped, "--workers", "1", "--set", "max_steps=40")
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(cells(stopped)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {name: path.stat().st_mtime_ns for name, path in cells(stopped).items()}
    assert 2 <= len(before) < RUNS
    for folder in (stopped, whole):
        arguments, environment = command(folder, "--set", "max_steps=40")
        subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=280)
    after = cells(stopped)
    assert {name: after[name].stat().st_mtime_ns for name in before} == before  # what was done is not done again
    assert len(after) == RUNS
    numbers = [json.loads((folder / "out" / "report.json").read_text()) for folder in (stopped, whole)]
    assert numbers[0]["missing"] == numbers[1]["missing"] == []
    measures = ("label", "seed", "clean", "attacked", "routing_kept")
    assert [[cell[name] for name in measures] for cell in numbers[0]["cells"]] == [
        [cell[name] for name in measures] for cell in numbers[1]["cells"]
    ]


@pytest.mark.slow
@pytest.mark.once
def test_runs_of_a_killed_study_end(tmp_path):
    write_study(tmp_path, STUDY)
    change_recipe(tmp_path, "hidden_size: 16", "hidden_size: 1024")  # steps that take long
    arguments, environment = command(tmp_path, "--workers", "1", "--set", "max_steps=230")
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("out/logs/*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    time.sleep(3)  # into its training
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(started, timeout=15)
    for one in left:
        one.kill()
    assert started
    assert left == []
    assert cells(tmp_path) == {}  # it did not end by itself


@pytest.mark.slow
@pytest.mark.once
def test_a_cell_that_fails_is_reported_and_the_others_are_run(tmp_path):
    write_study(tmp_path, "seeds: [0]")
    change_recipe(tmp_path, "hidden_size: 16", "hidden_size: 16000000")  # more than any machine's memory
    arguments, environment = command(tmp_path)
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 1
    assert "failed: smoe, graph, seed 0" in result.stdout
    assert "exit code 1:" in result.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == []
