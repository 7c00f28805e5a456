# SPDX-License-Identifier: Apache-2.0
"""What `opd_ext/bridge` touches of verl, vLLM, Ray and TransferQueue, read from its source."""

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from .seams import PACKAGE

FOREIGN = ("verl", "vllm", "ray", "transfer_queue")
FILES = [*sorted((PACKAGE / "bridge").glob("*.py")), PACKAGE / "plugin.py"]


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in FOREIGN


def module_of(path: Path) -> str:
    return ".".join(("opd_ext", *path.relative_to(PACKAGE).with_suffix("").parts))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


# ---------------------------------------------------------------------- classes


def classes(path: Path) -> Iterator[tuple[ast.ClassDef, type, list[type]]]:
    """Classes of a file that inherit from a foreign one: source, class, foreign bases."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ClassDef):
            kind = getattr(importlib.import_module(module_of(path)), node.name)
            if hasattr(kind, "__ray_metadata__"):  # what `ray.remote` made of it
                kind = kind.__ray_metadata__.modified_class
                kind = vars(kind).get("__ray_actor_class__", kind)
            bases = [base for base in kind.__mro__[1:] if _is_foreign(base.__module__)]
            if bases:
                yield node, kind, bases


@functools.cache
def _attributes(base: type) -> frozenset[str]:
    """What instances of ``base`` have by its own doing: class attributes, and what its methods put on ``self``."""
    found = {name for name in vars(base) if not (name.startswith("__") and name != "__init__")}
    module = ast.parse(inspect.getsource(sys.modules[base.__module__]))
    source = next((node for node in module.body if getattr(node, "name", "") == base.__name__), module)
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "instance"):
                found.add(node.attr)
    return frozenset(found)


def members(path: Path) -> dict[str, bool]:
    """``Class.member`` -> whether it overrides one of a foreign base; False: it uses what the base has."""
    found = {}
    for node, kind, bases in classes(path):
        theirs = frozenset().union(*map(_attributes, bases))
        own = {name for name in vars(kind) if not (name.startswith("__") and name != "__init__")}
        found |= {f"{node.name}.{name}": True for name in own & theirs if name != "_abc_impl"}
        used = {
            part.attr
            for part in ast.walk(node)
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self"
        }
        found |= {f"{node.name}.{name}": False for name in (used & theirs) - own}
    return found


# ---------------------------------------------------------------------- imports, assignments, private names


def imports(path: Path) -> set[str]:
    """``module:name`` of every foreign name that a file imports, or reaches through a foreign module."""
    aliases, found = {}, set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names if _is_foreign(alias.name)}
        elif isinstance(node, ast.ImportFrom) and _is_foreign(node.module or ""):
            for alias in node.names:
                try:
                    importlib.import_module(f"{node.module}.{alias.name}")
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                except ImportError:
                    found.add(f"{node.module}:{alias.name}")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            if not node.attr.startswith("__"):
                found.add(f"{aliases[node.value.id]}:{node.attr}")
    return found


def _standard(tree: ast.Module) -> set[str]:
    """Names under which a file knows modules of the standard library."""
    names = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {alias.asname or alias.name for alias in names if alias.name.partition(".")[0] in sys.stdlib_module_names}


def assignments(path: Path) -> set[str]:
    """Text of every assignment to an attribute of anything but ``self`` and Python's own modules."""
    tree, found = tree_of(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if getattr(node.value, "id", None) not in {"self", *_standard(tree)}:
                found.add(ast.unparse(node))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            found.add(ast.unparse(node.args[0]))
    return found


def private_names(path: Path) -> set[str]:
    """Names with an underscore that a file reads of other objects and does not define."""
    tree = tree_of(path)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    defined |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    skipped, found = {"self", "cls", *_standard(tree)}, set()  # of `self`: see members
    for node in attributes:
        if not node.attr.startswith("_") or not isinstance(node.ctx, ast.Load):
            continue
        of_base = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
        python = node.attr in ("__init__", "__new__", "__file__", "__name__", "__cause__", "__dict__", "__getitem__")
        if not (of_base or python or node.attr in defined or getattr(node.value, "id", None) in skipped):
            found.add(node.attr)
    return found
