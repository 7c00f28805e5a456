# SPDX-License-Identifier: Apache-2.0
"""What a user types on a command line, as overrides in Hydra's grammar."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from opd_ext.errors import ConfigError, did_you_mean

KEY = r"[+~]*[\w.@/-]+"
_OPTIONS = ("--dry-run", "--cfg", "--config-dir", "--help")
_PRESETS = Path(__file__).parent


def from_words(words: Sequence[str], config_dirs: Sequence[str | Path] = ()) -> list[str]:
    """``crisp``, ``--method crisp`` and ``method = crisp`` are all ``method=crisp``; the rest stays as it is.

    Args:
        words: of a command line, without the options of the command itself.
        config_dirs: further folders with presets.

    Raises:
        ConfigError: a lone word that is nearly the name of a method.
    """
    joined: list[str] = []
    for word in words:
        if word.startswith("--"):
            _check_option(word)
        if joined and joined[-1].endswith("=") and "=" not in word:
            joined[-1] += word  # method= crisp; method = crisp
        elif joined and word.startswith("=") and "=" not in joined[-1]:
            joined[-1] += word  # method =crisp
        elif joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"  # --method crisp
        else:
            joined.append(word)
    found = [_as_choice(word.removeprefix("--"), config_dirs) for word in joined]
    for group in ("method", "recipe"):
        words = [word for word, name in zip(joined, found, strict=True) if name == f"{group}={word}"]
        if len(words) > 1:
            raise ConfigError(f"{' and '.join(words)} are {len(words)} {group}s, and a run has one: choose one.")
    return found


def _check_option(word: str) -> None:
    """An option is a group of presets, or a key with dots; raises ConfigError for any other."""
    name, _, _ = word.removeprefix("--").partition("=")
    groups = [path.name for path in _PRESETS.iterdir() if path.is_dir()]
    if name not in groups and "." not in name:
        options = [*_OPTIONS, *(f"--{group}" for group in groups)]
        raise ConfigError(f"--{name} is no option; write settings as KEY=VALUE.{did_you_mean(f'--{name}', options)}")


def _as_choice(word: str, config_dirs: Sequence[str | Path]) -> str:
    """A lone word is a method, or a recipe where it has a slash."""
    if "=" in word or word.startswith("~"):
        return word
    group = "recipe" if "/" in word else "method"
    names = {
        str(path.relative_to(folder).with_suffix(""))
        for folder in (Path(root) / group for root in (_PRESETS, *config_dirs))
        for path in folder.rglob("*.yaml")
    }
    if word not in names and (meant := did_you_mean(word, names)):
        raise ConfigError(f"{group}={word} does not exist.{meant}")
    return f"{group}={word}" if word in names else word


def check_groups(overrides: Iterable[str], config_dirs: Sequence[str | Path] = ()) -> None:
    """Raises ConfigError for a group of presets that gets no name or several, and for a section that is none."""
    folders = (_PRESETS, *map(Path, config_dirs))
    groups = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    for override in overrides:
        key, _, value = override.partition("=")
        if not re.fullmatch(r"\w+", key):
            continue
        if key in groups and not re.fullmatch(r"[\w./-]+", value):
            raise ConfigError(f"{override} names no {key}: write the name of one, {key}=NAME.")
        if key in _SECTIONS and not value.startswith("{"):
            raise ConfigError(f"{override} replaces a whole section: set the keys below it, {key}.KEY=VALUE.")


_SECTIONS = ("opd", "data", "trainer", "actor_rollout_ref", "algorithm", "reward", "ray_kwargs", "transfer_queue")


def check_folders(config_dirs: Sequence[str | Path]) -> None:
    """Raises ConfigError for a folder of presets that is not there: Hydra would go on without it."""
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder} is no folder: name the one that holds the folders of presets.")


def readable(override: str) -> str:
    """A value that a shell can hold and Hydra's grammar cannot, such as a path with blanks, becomes a quoted text."""
    key, equals, value = override.partition("=")
    if equals and re.fullmatch(KEY, key) and not re.search(r"[\[\]{}'\",]", value):
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            return f"{key}={quoted(value)}"
    return override


def quoted(text: str) -> str:
    """``text`` as Hydra's grammar quotes it."""
    escaped = text.replace("'", "\\'")
    return f"'{escaped}'"


def unreadable(override: str) -> str:
    """The sentence for an override that Hydra's grammar cannot read."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(KEY, key):
        return f"{override} cannot be read: write KEY=VALUE, without blanks around the equals sign."
    if "," in value and not value.startswith(("[", "{", "'", '"')):
        return f'{override} cannot be read: write a list as "{key}=[A,B]", and a text with a comma as "{key}=\'A,B\'".'
    return f"{override} cannot be read: close its brackets and quotes, and quote a text that holds any."


def keys_of(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a nested section, in dots."""
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{prefix}{key}.")
