"""Processes of other people's programs, which never import symphony_hf themselves."""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def write_entry_points(folder):
    """Write the metadata that an installation of this package has, by which torch and engines find its entry points."""
    declared = re.findall(
        r'\[project\.entry-points\."(.*)"\].*\nsymphony_hf = "(.*)"', (ROOT / "pyproject.toml").read_text()
    )
    assert len(declared) == 3
    metadata = folder / "symphony_hf-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: symphony-hf\nVersion: 0.1.0\n")
    entries = (f"[{group}]\nsymphony_hf = {function}\n" for group, function in declared)
    (metadata / "entry_points.txt").write_text("".join(entries))
    return folder


def environment(site, installed=True):
    """Return the variables of a process for which the package is installed, or as if it were not."""
    paths = os.pathsep.join([str(site), str(ROOT)])
    return os.environ | {
        "PYTHONPATH": paths,
        "SYMPHONY_HF_AUTOLOAD": str(int(installed)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_client(script, site, *arguments, installed=True, python=sys.executable, timeout=280):
    """Run a script that assigns to `found`, and return its value, which is written as JSON."""
    script = f"import json, sys\n{script}\nprint('found:' + json.dumps(found))"
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(site, installed),
        cwd=site,  # not where an earlier installation may have left its metadata
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("found:")[2])


def write_format_1(source, folder):
    """Write a checkpoint as the first releases wrote it: with a mark in `architectures` alone."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("symphony_hf")["replaced"] | {"auto_map": {}}
    config["symphony"] = {name: value for name, value in config["symphony"].items() if name != "model_class"}
    config["symphony"]["format"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def greedy_tokens(model, prompts, length=16):
    """Return the greedy continuation of each prompt by the model itself, without a cache or an end."""
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


def read_config_as(engine, folder):
    """Return a checkpoint's config as code of an engine reads it."""
    module = types.ModuleType(f"{engine}.configs")
    code = "from transformers import AutoConfig\ndef read(folder):\n    return AutoConfig.from_pretrained(folder)\n"
    exec(code, module.__dict__)
    return module.read(folder)
