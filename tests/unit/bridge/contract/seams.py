# SPDX-License-Identifier: Apache-2.0
"""The table of contracts, and how one is held against the installed libraries."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.conftest import TESTS

PACKAGE = TESTS.parent / "opd_ext"

SEAMS: list["Seam"] = []


@dataclass(frozen=True)
class Seam:
    """One contract.

    Attributes:
        where: the file that relies on it, relative to ``opd_ext``.
        check: runs the behaviour; its docstring says what is relied on, its parameters are fixtures.
        covers: what of that file it vouches for: ``Class.member`` for an override or an inherited attribute, the text
            of an assignment to a foreign object, a private name.
        pins: ``module:attribute`` of a library -> its parameters, as :func:`parameters` writes them; None where it has
            none, or more than anybody relies on.
    """

    where: str
    check: Callable[..., None]
    covers: frozenset[str]
    pins: dict[str, str | None]

    def __str__(self) -> str:
        return f"{self.where.rpartition('/')[2].removesuffix('.py')}-{self.check.__name__}"

    def hold(self, **fixtures: Any) -> None:
        """Raises AssertionError, naming the file of ours to look at, when the library keeps the contract no longer."""
        try:
            for path, wanted in self.pins.items():
                found = parameters(resolve(path)) if wanted is not None else resolve(path) and None
                assert found == wanted, f"{path} takes ({found}) where ({wanted}) is relied on"
            self.check(**fixtures)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            relies = " ".join((self.check.__doc__ or "").split())
            raise AssertionError(
                f"look at opd_ext/{self.where} ({', '.join(sorted(self.covers)) or 'imports'}). It relies on: {relies} "
                f"Now: {told}"
            ) from error


def seam(where: str, covers: str = "", pins: dict[str, str | None] | None = None) -> Callable:
    """Decorator that puts a behaviour into the table; ``covers`` is separated by spaces."""

    def file(check: Callable[..., None]) -> Callable[..., None]:
        assert check.__doc__, f"{check.__name__} must say what is relied on"
        SEAMS.append(Seam(where, check, frozenset(covers.split()), dict(pins or {})))
        return check

    return file


def resolve(path: str) -> Any:
    """``package.module:Class.attribute`` -> the object."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
        if isinstance(found, (staticmethod, classmethod)):
            found = found.__func__
    return found


def parameters(function: Callable[..., Any]) -> str:
    """Names and kinds in order: ``name``, ``name=`` with a default, ``*`` before keyword-only ones, ``*a``, ``**k``."""
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "_ray_trace_ctx":  # Ray adds it to the methods of a class that became an actor's
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        words.append(f"{stars}{parameter.name}{'=' if parameter.default is not parameter.empty else ''}")
    return " ".join(words)


def bare(kind: type, **attributes: Any) -> Any:
    """An object of ``kind`` that never saw its constructor, with these attributes."""
    found = object.__new__(kind)
    for name, value in attributes.items():
        object.__setattr__(found, name, value)
    return found


def says(path: str, *fragments: str) -> None:
    """The source of ``module:attribute`` holds these fragments, white space aside.

    For what only runs with Ray or on an accelerator; the contract says why beside it.
    """
    source = "".join(inspect.getsource(resolve(path)).split())
    missing = [fragment for fragment in fragments if "".join(fragment.split()) not in source]
    assert not missing, f"{path} no longer says {missing}"
