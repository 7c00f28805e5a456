# SPDX-License-Identifier: Apache-2.0
"""Name -> function or class tables that stay open to user modules, with an error that lists what exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

E = TypeVar("E")
T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[E]):
    """Functions or classes of one kind ``E``, by name.

    ``what`` is the singular noun of the error messages ("divergence", "teacher context", ...).
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a function or class under ``name``; ``ValueError`` if another one has that name."""

        def file(entry: T) -> T:
            taken = self._entries.get(name, entry)
            if taken is not entry and _origin(taken) != _origin(entry):
                raise ValueError(f"The {self.what} '{name}' is registered already; choose another name.")
            self._entries[name] = entry
            return entry

        return file

    def get(self, name: str) -> E:
        """What is filed under ``name``; ``ValueError`` with the known names otherwise."""
        if name not in self._entries:
            raise ValueError(f"Unknown {self.what} '{name}'; allowed: {', '.join(self.names())}.")
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)


def _origin(entry: Any) -> Any:
    """Where an entry was defined: a user module that is imported twice under one name defines its entries anew."""
    name = getattr(entry, "__qualname__", None)
    return id(entry) if name is None or "<" in name else (entry.__module__, name)
