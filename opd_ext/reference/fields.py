# SPDX-License-Identifier: Apache-2.0
"""What the source says about the fields of a settings dataclass: meaning, type and default, in a user's words."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

import opd_ext

PACKAGE = Path(opd_ext.__file__).parent

_WORDS = {str: "text", int: "int", float: "float", bool: "true or false", Any: "anything", type(None): "null"}


def source_file(thing: Any) -> str:
    """Where a class or function is defined, relative to the package."""
    return str(Path(inspect.getsourcefile(inspect.unwrap(thing))).relative_to(PACKAGE))


@cache
def _parsed(path: str) -> tuple[ast.Module, dict[int, str]]:
    """A file's syntax tree, and the comment of every line that has one behind its code."""
    text = Path(path).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }
    return ast.parse(text), comments


def meanings(kind: type) -> dict[str, str]:
    """Field -> what its line's comment, or the docstring below it, says; fields without either are left out.

    Inherited fields are looked up where they are defined.
    """
    found: dict[str, str] = {}
    for owner in reversed([cls for cls in kind.__mro__ if dataclasses.is_dataclass(cls)]):
        tree, comments = _parsed(inspect.getsourcefile(owner))
        node = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner.__name__)
        for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            lines = range(statement.lineno, statement.end_lineno + 1)
            said = " ".join(comments[line] for line in lines if line in comments)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                said = inspect.cleandoc(str(below.value.value))
            if said:
                found[statement.target.id] = " ".join(said.split())
    return found


def described_parameters(docstring: str | None) -> dict[str, str]:
    """Name -> description, of the ``Args:`` and ``Attributes:`` sections of a docstring."""
    text = inspect.cleandoc(docstring or "")
    found: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:(?: +.*)?\n?)+)", text, re.MULTILINE):
        for names, said in re.findall(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found |= {name.strip(): " ".join(said.split()) for name in names.split(",")}
    return found


def type_words(annotation: Any) -> str:
    """A type as a user of YAML would say it."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(type_words, arguments))
    if origin in (list, tuple) or isinstance(origin, type) and issubclass(origin, Collection) and origin is not dict:
        return f"list of {type_words(arguments[0])}" if arguments else "list"
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin is not None or dataclasses.is_dataclass(annotation) or annotation is dict:
        return "mapping"
    return getattr(annotation, "__name__", str(annotation))


def field_types(kind: type) -> dict[str, Any]:
    """Field -> resolved type."""
    hints = typing.get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def nested(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass inside an annotation, if any, and whether there is one per name (``dict``)."""
    if dataclasses.is_dataclass(annotation):
        return annotation, False
    for inner in typing.get_args(annotation):
        kind, _ = nested(inner)
        if kind is not None:
            return kind, typing.get_origin(annotation) is dict
    return None, False


def owner_of(kind: type, name: str) -> type:
    """The class of ``kind``'s ancestry that defines the field."""
    return next(cls for cls in kind.__mro__ if name in cls.__dict__.get("__annotations__", {}))


def value_words(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_words, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_words(item)}" for key, item in value.items()) + "}"
    if dataclasses.is_dataclass(value):
        return value_words({entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)})
    return str(value) if value != "" else '""'
