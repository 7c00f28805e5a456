# SPDX-License-Identifier: Apache-2.0
"""How bad input is refused: one sentence that names the key and what to change."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any


class ConfigError(ValueError):
    """One sentence: which key is wrong and what it may be."""


def one_of(key: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} does not exist; choose one of: {', '.join(sorted(allowed))}.")


def positive(key: str, value: float, zero: bool = False) -> None:
    if value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{key}={value} must be {'zero or ' if zero else ''}positive.")


def check_options(key: str, kind: str, given: dict[str, Any], allowed: Iterable[str] | None) -> None:
    allowed = None if allowed is None else sorted(allowed)
    for name in given:
        if allowed is not None and name not in allowed:
            takes = f"it takes: {', '.join(allowed)}" if allowed else "it takes no options"
            raise ConfigError(f"{key}.{name} does not exist for kind={kind}: take it out (~{key}.{name}); {takes}.")


def parameters(function: Callable[..., Any], skip: int) -> list[str] | None:
    """Names of the parameters after the first ``skip``; None if it takes any (``**kwargs``)."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters][skip:]
