# SPDX-License-Identifier: Apache-2.0
"""What verl's files say, read as text: importing verl takes seconds, and settles its platform."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_BASES = "verl.base_config"  # where verl's dataclasses have their common base
_WITHOUT_FIELDS = ("object", "collections.abc.Mapping")


@cache
def folder() -> Path | None:
    """Of the installed package; None without one."""
    verl = importlib.util.find_spec("verl")
    return Path(verl.origin).parent if verl and verl.origin else None


def policy_loss_source(name: str) -> tuple[Path, int] | None:
    """File and line of a policy loss in verl's registry; None if verl's own file has no such loss."""
    if (verl := folder()) is None:
        return None
    file = verl / "trainer" / "ppo" / "core_algos.py"
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if re.search(rf"register_policy_loss\(\s*[\"']{re.escape(name)}[\"']", line):
            return file, number
    return None


def loggers() -> list[str]:
    """Names that ``trainer.logger`` may list: ``Tracking.supported_backend``."""
    tracking = _classes("verl.utils.tracking")["Tracking"]
    for node in tracking.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "supported_backend":
            return list(ast.literal_eval(node.value))
    raise ValueError("verl.utils.tracking:Tracking has no supported_backend")


def agent_loops() -> list[str]:
    """Names under which verl's modules register agent loops."""
    return [
        ast.literal_eval(decorator.args[0])
        for node in _classes("verl.experimental.agent_loop").values()
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register"
    ]


def fields(target: str) -> frozenset[str] | None:
    """Names that the dataclass ``target`` (``module.Class``) of verl's takes, its bases' among them.

    Returns:
        None if it is not found by its name, or has a base that is not.
    """
    module, _, name = target.rpartition(".")
    return _fields(module, name)


@cache
def _fields(module: str, name: str) -> frozenset[str] | None:
    classes = _classes(module)
    if name not in classes:
        return None
    found = {
        node.target.id
        for node in classes[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if "ClassVar" not in ast.unparse(node.annotation) and "InitVar" not in ast.unparse(node.annotation)
    }
    for base in map(ast.unparse, classes[name].bases):
        if base in _WITHOUT_FIELDS:
            continue
        inherited = _fields(module if base in _classes(module) else _BASES, base)
        if inherited is None:
            return None
        found |= inherited
    return frozenset(found)


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Every class of a module of verl's, or of all the modules of a package."""
    return {
        node.name: node
        for file in _files(module)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }


def _files(module: str) -> Iterator[Path]:
    if (verl := folder()) is None or not (module == "verl" or module.startswith("verl.")):
        return
    path = verl.joinpath(*module.split(".")[1:])
    if path.is_dir():
        yield from sorted(path.rglob("*.py"))
    elif (file := path.with_suffix(".py")).is_file():
        yield file
