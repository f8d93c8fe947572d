"""Finds, by reading the package's sources, the private names of other libraries that it uses."""

import ast
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

import symphony_hf

ALWAYS_FOREIGN = {*vars(nn.Module()), *dir(PreTrainedModel), *dir(PreTrainedConfig), *dir(Trainer)}
"""What we override is theirs too."""
ROOT = Path(symphony_hf.__file__).parent
READERS = {"getattr", "hasattr", "setattr", "delattr", "pop", "get", "setdefault"}


def is_private(name):
    """Whether it is one word with one leading underscore; with a trailing one, it is a part of a longer name."""
    is_word = isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.endswith("_")
    return is_word and name[1] != "_"


def _defined_here(trees):
    """Private names that the package defines itself: functions, classes, variables, attributes of `self`."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__setattr__":
                names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and is_private(arg.value))
    return names - ALWAYS_FOREIGN


def _is_foreign_holder(value, foreign):
    """`super()`, or a name that was imported from another library, or an attribute of one."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id in foreign


def _imports(tree):
    """(names bound from other libraries, private names in their paths)."""
    bound, private = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound.add((alias.asname or alias.name).split(".")[0])
                private.update(filter(is_private, alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("symphony_hf"):
            for alias in node.names:
                bound.add(alias.asname or alias.name)
                private.update(filter(is_private, [*(node.module or "").split("."), alias.name]))
    return bound, private


def _quoted(tree):
    """Private names in quotes, where an attribute or an entry of `__dict__` is read or written by name."""
    for node in ast.walk(tree):
        values = []
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            values = node.args[:2] if name in READERS else []
        elif isinstance(node, ast.Subscript):
            values = [node.slice]
        elif isinstance(node, ast.Compare):
            values = [node.left]
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            values = node.iter.elts
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            values = node.value.elts
        yield from (value.value for value in values if isinstance(value, ast.Constant) and is_private(value.value))


def private_names_by_room():
    """Private name of another library -> the rooms that use it."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    own, found = _defined_here(trees.values()), {}
    for path, tree in trees.items():
        foreign, names = _imports(tree)
        for node in ast.walk(tree):
            is_used = isinstance(node, ast.Attribute) and is_private(node.attr)
            if is_used and (node.attr not in own or _is_foreign_holder(node.value, foreign)):
                names.add(node.attr)
        names.update(name for name in _quoted(tree) if name not in own)
        for name in names:
            if not name.startswith("_symphony"):
                found.setdefault(name, set()).add(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    return found
