"""Seeded mutations of a checkpoint's files."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Mutation = Callable[[Path, random.Random], str]
"""A function that changes the files of a folder and describes the change."""

_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 4097, 2**31, 2**53, 2**63, 10**30, 0.5, -0.5, 1.5, 1e-300, 1e300),
    *(math.nan, math.inf, -math.inf, "", "1", "x", "../../etc/passwd", "/dev/zero", "\x00", "smoe", "logits"),
    *([], [0], [-1], [10**9], ["*"], [None], [[]], {}, {"a": 1}, {"format": 2}),
]
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F128", "")


def of_entry(key: str) -> Mutation:
    """Return a mutation of an entry of config.json: one of its settings, or all of it."""
    return lambda folder, rng: _mutate_under(folder / "config.json", key, rng)


def of_json(name: str) -> Mutation:
    """Return a mutation of a JSON file: a field at any depth, or its bytes."""
    return lambda folder, rng: _mutate_json(folder / name, rng)


def mutate_config(folder: Path, rng: random.Random) -> str:
    """Mutate any field of config.json, at any depth."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change = _mutate_object(values, rng)
    file.write_text(json.dumps(values))
    return change


def mutate_config_text(folder: Path, rng: random.Random) -> str:
    """Mutate the bytes of config.json."""
    return _mutate_text(folder / "config.json", rng)


def mutate_index(folder: Path, rng: random.Random) -> str:
    """Split the weights into shards and mutate their index: the file of a tensor, or its bytes."""
    file, weights = folder / "model.safetensors.index.json", folder / "model.safetensors"
    tensors, weight_map = load_file(weights), dict[str, Any]()
    weights.unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    if rng.random() < 0.4:
        return _mutate_json(file, rng)
    name = rng.choice(names)
    weight_map[name] = rng.choice([*_VALUES, "model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors"])
    file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return f"{name} in {weight_map[name]!r}"


def mutate_header(folder: Path, rng: random.Random) -> str:
    """Mutate the safetensors header (its length, its JSON, a tensor's entry), or the end of the file."""
    file = _weights(folder)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    way = rng.choice(("length", "bytes", "entry", "entry", "entry", "end"))
    if way == "length":
        claimed = rng.choice((0, 1, length - 1, length + 1, len(content), 10**8 + 1, 2**40, 2**63, 2**64 - 1))
        file.write_bytes(claimed.to_bytes(8, "little") + header + data)
        return f"header length {claimed}"
    if way == "bytes":
        flipped, change = _flip(header, rng)
        file.write_bytes(content[:8] + flipped + data)
        return f"header {change}"
    if way == "end":
        cut = rng.choice((rng.randrange(len(content)), 0, 7, 8, len(content) + 64))
        file.write_bytes(content[:cut] + b"\x00" * max(0, cut - len(content)))
        return f"file of {cut} bytes instead of {len(content)}"
    entries = json.loads(header)
    name = rng.choice(sorted(entries))
    change = f"header of {name}: {_claim(entries, name, rng)}"
    encoded = json.dumps(entries).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return change


def _claim(entries: dict[str, Any], name: str, rng: random.Random) -> str:
    what = rng.choice(("shape", "offsets", "dtype", "gone", "renamed", "value"))
    entry = entries[name]
    if what == "gone":
        del entries[name]
    elif what == "renamed":
        entries[rng.choice(("x", "../x", name + ".symphony.adjacency", name.upper()))] = entries.pop(name)
    elif what == "value" or "shape" not in entry:
        entries[name] = rng.choice(_VALUES)
    elif what == "shape":
        entry["shape"] = rng.choice(([2**40], [2**20, 2**24], [2**62, 4], [0], [-1], [], [1, *entry["shape"]], "x"))
    elif what == "offsets":
        start, end = entry["data_offsets"]
        claims = ([start, end + 2**42], [0, 2**63], [end, start], [start + 1, end], [-8, end], [start], None)
        entry["data_offsets"] = rng.choice(claims)
    else:
        entry["dtype"] = rng.choice(_DTYPES)
    return what


def mutate_graph(folder: Path, rng: random.Random) -> str:
    """Mutate or remove a tensor of a graph: its values, shape or dtype."""
    file = _weights(folder)
    tensors = load_file(file)
    name = rng.choice(sorted(key for key in tensors if key.endswith((".adjacency", ".updates"))))
    way = rng.choice(sorted(_GRAPHS))
    changed = _GRAPHS[way](tensors.pop(name), rng)
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name}: {way}"


def _with_one(value: float) -> Callable[[Tensor, random.Random], Tensor]:
    def put(tensor: Tensor, rng: random.Random) -> Tensor:
        flat = tensor.double().flatten() if tensor.is_floating_point() else tensor.flatten()
        flat[rng.randrange(len(flat))] = value if tensor.is_floating_point() else int(max(min(value, 2**62), -(2**62)))
        return flat.to(tensor.dtype).view(tensor.shape)

    return put


def _far_apart(tensor: Tensor) -> Tensor:
    """Return a symmetric matrix whose ratios exceed float32; a scalar becomes the smallest integer."""
    if tensor.ndim != 2:
        return tensor.fill_(-(2**63))
    return torch.full_like(tensor, 1e20) - torch.eye(len(tensor)) * 1e20 + torch.eye(len(tensor)) * 1e-30


_GRAPHS: dict[str, Callable[[Tensor, random.Random], Tensor | None]] = {
    "missing": lambda tensor, rng: None,
    "a NaN": lambda tensor, rng: tensor.double().fill_(math.nan).to(tensor.dtype),
    "infinite": lambda tensor, rng: _with_one(1e300)(tensor, rng),
    "negative": lambda tensor, rng: -tensor - 1,
    "one negative": _with_one(-1e-30),
    "one large": _with_one(3e38),
    "one changed": _with_one(0.7),
    "all large": lambda tensor, rng: tensor.double().fill_(3e38).to(tensor.dtype),
    "zero": lambda tensor, rng: torch.zeros_like(tensor),
    "far apart": lambda tensor, rng: _far_apart(tensor),
    "tiny": lambda tensor, rng: tensor.double().fill_(1e-44).to(tensor.dtype),
    "of float64": lambda tensor, rng: tensor.double(),
    "of float64, with a NaN": lambda tensor, rng: torch.full_like(tensor, math.nan, dtype=torch.float64),
    "of bfloat16": lambda tensor, rng: tensor.bfloat16(),
    "of int8": lambda tensor, rng: tensor.to(torch.int8),
    "of booleans": lambda tensor, rng: tensor.bool(),
    "complex": lambda tensor, rng: tensor.to(torch.complex64),
    "flat": lambda tensor, rng: tensor.flatten(),
    "a scalar": lambda tensor, rng: tensor.flatten()[0].clone(),
    "empty": lambda tensor, rng: tensor.flatten()[:0].clone(),
    "of more experts": lambda tensor, rng: torch.eye(rng.choice((5, 64, 512))),
    "with a dimension more": lambda tensor, rng: tensor.unsqueeze(0),
}


def _mutate_json(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return _mutate_text(file, rng)
    values = json.loads(file.read_text())
    change = _mutate_object(values, rng)
    file.write_text(json.dumps(values))
    return change


def _mutate_under(file: Path, key: str, rng: random.Random) -> str:
    values = json.loads(file.read_text())
    if rng.random() < 0.15:
        values[key] = rng.choice(_VALUES)
        change = f"{key} = {values[key]!r}"
    else:
        change = f"{key}.{_mutate_object(values[key], rng)}"
    file.write_text(json.dumps(values))
    return change


def _mutate_object(values: dict[str, Any], rng: random.Random) -> str:
    """Change, remove or add one entry of an object, or of one inside it."""
    name = rng.choice(sorted(values))
    inner = values[name]
    if isinstance(inner, dict) and inner and rng.random() < 0.7:
        return f"{name}.{_mutate_object(inner, rng)}"
    way = rng.random()
    if way < 0.15:
        del values[name]
        return f"{name} removed"
    if way < 0.25:
        name = rng.choice((name + "_", "auto_map", "quantization_config", "symphony", "__class__", "unknown"))
    value = rng.choice(_VALUES)
    if isinstance(inner, list) and inner and rng.random() < 0.5:
        value = [*inner[:-1], value]
    values[name] = value
    return f"{name} = {value!r}"


def _mutate_text(file: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    way = rng.choice(("flip", "flip", "cut", "deep", "replaced"))
    if way == "flip":
        content, change = _flip(content, rng)
    elif way == "cut":
        content = content[: rng.randrange(len(content))]
        change = f"cut to {len(content)} bytes"
    elif way == "deep":
        content = b'{"a":' * 100_000
        change = "100,000 objects deep"
    else:
        content = rng.choice((b"", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf" + content, b"{}" * 2))
        change = f"begins with {content[:4]!r}"
    file.write_bytes(content)
    return change


def _flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    changed = bytearray(content)
    positions = [rng.randrange(len(changed)) for _ in range(rng.choice((1, 1, 4, 32)))]
    for position in positions:
        changed[position] = rng.randrange(256)
    return bytes(changed), f"{len(positions)} bytes changed from {positions[0]} on"


def _weights(folder: Path) -> Path:
    return next(folder.glob("*model.safetensors"))


MUTATIONS: dict[str, dict[str, Mutation]] = {
    "graphs": {
        "settings": of_entry("symphony"),
        "config": mutate_config,
        "config text": mutate_config_text,
        "generation config": of_json("generation_config.json"),
        "header": mutate_header,
        "index": mutate_index,
        "graph": mutate_graph,
    },
    "upcycled": {
        "settings": of_entry("symphony"),
        "upcycled": of_entry("upcycled"),
        "config": mutate_config,
        "header": mutate_header,
        "graph": mutate_graph,
    },
    "adapter": {
        "record": of_json("symphony_config.json"),
        "PEFT's config": of_json("adapter_config.json"),
        "header": mutate_header,
        "graph": mutate_graph,
    },
}
"""Mutations of each specimen, by the part that they change."""
