# SPDX-License-Identifier: Apache-2.0
"""Name -> function tables that stay open to user modules, with an error that lists what exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Registry:
    """Functions of one kind, by name.

    ``what`` is the singular noun of the error messages ("divergence", "credit", ...).
    """

    def __init__(self, what: str):
        self.what = what
        self._functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator that files a function under ``name``; ``ValueError`` if another one has that name."""

        def file(function: Callable[..., Any]) -> Callable[..., Any]:
            if self._functions.get(name, function) is not function:
                raise ValueError(f"The {self.what} '{name}' is registered already; choose another name.")
            self._functions[name] = function
            return function

        return file

    def get(self, name: str) -> Callable[..., Any]:
        """The function filed under ``name``; ``ValueError`` with the known names otherwise."""
        if name not in self._functions:
            raise ValueError(f"Unknown {self.what} '{name}'; allowed: {', '.join(self.names())}.")
        return self._functions[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._functions)
