# SPDX-License-Identifier: Apache-2.0
"""What Hydra and OmegaConf refuse, in the words of this project: one sentence, the key, what to change."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from opd_ext.errors import ConfigError

RECIPES = Path(__file__).parent / "recipe"


def refusal(
    error: Exception, overrides: Sequence[str], command: str, recipes: Path = RECIPES, own: str = ""
) -> ConfigError:
    """The refusal that says of ``error`` what a user can act on.

    Args:
        error: of Hydra or OmegaConf.
        overrides: what the user wrote.
        command: whose ``--cfg`` shows the keys that exist, e.g. ``opd train``.
        recipes: the folder of recipes; ``own``: with what the names of the command's own begin.
    """
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return ConfigError(
        _sentence(error, lines or [type(error).__name__], overrides, f"see `{command} --cfg`", _names(recipes, own))
    )


def _sentence(error: Exception, lines: list[str], overrides: Sequence[str], where: str, recipes: list[str]) -> str:
    if isinstance(error, MissingConfigException) and (wanted := re.search(r"'([^']+)/([^'/]+)'", lines[0])):
        group, name = wanted.groups()
        available = _available(lines)
        if group.split("/")[0] == "recipe":  # Hydra does not look into its folders
            group, name, available = "recipe", wanted[0].strip("'").removeprefix("recipe/"), recipes
        return f"{group}={name} does not exist; choose one of: {', '.join(available) or 'none is there'}."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read: write KEY=VALUE, and quote a value that holds spaces, commas or braces."
        )
    if isinstance(error, ConfigCompositionException) and (
        wanted := re.match(r"Could not override '([^']+)'", lines[0])
    ):
        key = wanted[1]
        added = next((f" (+{given} adds it)" for given in overrides if given.startswith(f"{key}=")), "")
        return f"{key} does not exist; {where} for the keys that do{added}."
    if isinstance(error, InterpolationKeyError):
        named = re.search(r"'([^']+)'", lines[0])
        target = f"${{{named[1]}}}" if named else lines[0]
        return f"{_key(error)} refers to {target}, which does not exist; {where} for the keys that do."
    if isinstance(error, OmegaConfBaseException) and lines[0].startswith("Key '"):
        return f"{_key(error)} does not exist; {where} for the keys that do."
    if isinstance(error, OmegaConfBaseException):
        return f"{_key(error)}: {lines[0]}; {where} for what it is."
    return f"The configuration does not compose: {lines[0]}."


def _available(lines: list[str]) -> list[str]:
    """The names between `Available options` and `Config search path` of Hydra's message."""
    start = next((i for i, line in enumerate(lines) if line.startswith("Available options")), len(lines))
    names = lines[start + 1 :]
    end = next((i for i, line in enumerate(names) if line.startswith("Config search path")), len(names))
    return names[:end]


def _names(folder: Path, own: str) -> list[str]:
    names = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    return [name for name in names if name.startswith(own)]


def _key(error: OmegaConfBaseException) -> str:
    return error.full_key or "The configuration"
