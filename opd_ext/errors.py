# SPDX-License-Identifier: Apache-2.0
"""How bad input is refused: one sentence that names the key and what to change."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")

ABSENT = "none"
"""What a place is called that a method leaves empty (``null`` in the configuration)."""


class ConfigError(ValueError):
    """One sentence: which key is wrong and what it may be."""


class RunError(RuntimeError):
    """Why a run ended before its last step: the first cause, in words."""


def present(value: T | None, sentence: str) -> T:
    """``value``, in a place that is reached only where there is one; ``ValueError(sentence)`` for None."""
    if value is None:
        raise ValueError(sentence)
    return value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean X?`` for the name in ``known`` that is closest to ``word``, or nothing.

    A key ``section.name`` is looked for by its name among those of its section, then as the same name in another one:
    as whole words, long sections make any two keys alike.
    """
    known = list(known)
    section, _, last = word.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    near = [beside[name] for name in difflib.get_close_matches(last, beside, n=3, cutoff=0.75)]
    if not near:
        elsewhere = [name for name in known if not beside or name.endswith(f".{last}")]
        near = difflib.get_close_matches(word, elsewhere, n=3, cutoff=0.75)
    swapped = [name for name in near if sorted(name.rpartition(".")[2]) == sorted(last)]  # the usual slip of fingers
    return f" Did you mean {(swapped or near)[0]}?" if near else ""


def one_of(key: str, value: Any, allowed: Iterable[T]) -> T:
    """``value``, as one of ``allowed``; raises ConfigError for any other."""
    if value not in allowed:
        names = sorted(map(str, allowed))
        raise ConfigError(
            f"{key}={value} does not exist; choose one of: {', '.join(names)}.{did_you_mean(str(value), names)}"
        )
    return value


def positive(key: str, value: float, zero: bool = False, at_most: float | None = None, what: str = "") -> None:
    """Raises ConfigError for a number that is not positive (``zero``: negative), or above ``at_most``.

    ``what`` says what the number is, where the key does not.
    """
    if value < 0 or (value == 0 and not zero) or (at_most is not None and value > at_most):
        wanted = f"{'zero or ' if zero else ''}positive"
        if at_most is not None:
            wanted = f"in {'[' if zero else '('}0, {at_most}]"
        raise ConfigError(f"{key}={value} must be {wanted}{f': {what}' if what else ''}.")


def check_options(key: str, choice: str, given: Iterable[str], allowed: Iterable[str] | None) -> None:
    """Raises ConfigError for an option that ``choice`` (say ``kind=uniform``) does not have; None: it takes any."""
    allowed = None if allowed is None else sorted(allowed)
    for name in given:
        if allowed is not None and name not in allowed:
            takes = f"it takes: {', '.join(allowed)}" if allowed else "it takes no options"
            raise ConfigError(f"{key}.{name} does not exist for {choice}: take it out (~{key}.{name}); {takes}.")


def check_types(key: str, kind: type, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option in ``given`` that has not the type which the dataclass ``kind`` declares."""
    for name, hint in get_type_hints(kind).items():
        allowed = get_args(hint) or (hint,)
        if name not in given or not all(isinstance(each, type) for each in allowed):
            continue
        value, wanted = given[name], {*allowed, *((int,) if float in allowed else ())}
        if type(value) not in wanted:
            names = " or ".join("null" if each is type(None) else _TYPES.get(each, each.__name__) for each in allowed)
            raise ConfigError(f"{key}.{name}={value} must be {names}.")


_TYPES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def parameters(function: Callable[..., Any], skip: int) -> list[str] | None:
    """Names of the parameters after the first ``skip``; None if it takes any (``**kwargs``)."""
    found = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found):
        return None
    return [parameter.name for parameter in found][skip:]


def in_brief(error: BaseException, most: int = 200) -> str:
    """What a library said, on one line: whole sentences of ``most`` characters, or the words that fit of the first."""
    said, brief = " ".join(str(error).split()), ""
    for sentence in re.split(r"(?<=[.!?]) ", said):
        if len(brief) + len(sentence) >= most:
            break
        brief += f" {sentence}"
    return brief.strip() or textwrap.shorten(said, most, placeholder=" ...")
