# SPDX-License-Identifier: Apache-2.0
"""What Hydra and OmegaConf refuse, in the words of this project: one sentence, the key, what to change."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from opd_ext.config.overrides import unreadable
from opd_ext.errors import ConfigError, did_you_mean

RECIPES = Path(__file__).parent / "recipe"
# Sections that take any key, since somebody else reads them: vLLM, transformers, a chat template, Ray.
_OPEN = re.compile(r"(_kwargs|\.override_\w+|ray_init)\..")


def refusal(
    error: Exception,
    overrides: Sequence[str],
    command: str,
    recipes: Path = RECIPES,
    own: str = "",
    known: Callable[[], Iterable[str]] = tuple,
) -> ConfigError:
    """The refusal that says of ``error`` what a user can act on.

    Args:
        error: of Hydra or OmegaConf.
        overrides: what the user wrote.
        command: whose ``--cfg`` shows the keys that exist, e.g. ``opd train``.
        recipes: the folder of recipes; ``own``: with what the names of the command's own begin.
        known: gives the keys that exist, among which a mistyped one is looked for.
    """
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    told = _sentence(error, lines or [type(error).__name__], overrides, f"see `{command} --cfg`", _names(recipes, own))
    wrong = re.match(r"[\w.]+(?= does not exist)", told)
    return ConfigError(told + (did_you_mean(wrong[0], known()) if wrong else ""))


def _sentence(error: Exception, lines: list[str], overrides: Sequence[str], where: str, recipes: list[str]) -> str:
    if isinstance(error, MissingConfigException) and (wanted := re.search(r"'([^']+)/([^'/]+)'", lines[0])):
        group, name = wanted.groups()
        available = _available(lines)
        if group.split("/")[0] == "recipe":  # Hydra does not look into its folders
            group, name, available = "recipe", wanted[0].strip("'").removeprefix("recipe/"), recipes
        listed = ", ".join(available) or "none is there"
        return f"{group}={name} does not exist; choose one of: {listed}.{did_you_mean(name, available)}"
    if unread := _unread(error, lines, overrides):
        return unreadable(unread)
    if isinstance(error, ConfigCompositionException) and (
        wanted := re.match(r"Could not override '([^']+)'", lines[0])
    ):
        key = wanted[1]
        given = next((each for each in overrides if _OPEN.search(key) and each.startswith(f"{key}=")), None)
        added = f" (+{given} adds it)" if given else ""
        return f"{key} does not exist; {where} for the keys that do{added}."
    if there := re.search(r"An item is already at '([^']+)'", lines[0]):
        return f"+{there[1]} adds a key that is there already: leave the + out."
    if isinstance(error, InterpolationKeyError):
        named = re.search(r"'([^']+)'", lines[0])
        target = f"${{{named[1]}}}" if named else lines[0]
        return f"{_key(error)} refers to {target}, which does not exist; {where} for the keys that do."
    if isinstance(error, OmegaConfBaseException) and lines[0].startswith("Key '"):
        return f"{_key(error)} does not exist; {where} for the keys that do."
    if isinstance(error, OmegaConfBaseException):
        return f"{_key(error)}: {lines[0]}; {where} for what it is."
    return f"The configuration does not compose: {lines[0]}."


def _unread(error: Exception, lines: list[str], overrides: Sequence[str]) -> str | None:
    """The override that Hydra's grammar stumbled over; its lexer does not name it, so each is tried again."""
    if isinstance(error, ConfigCompositionException) and "Ambiguous value" in lines[0]:
        return next((given for given in overrides if given in lines[0]), lines[0])
    if isinstance(error, ConfigCompositionException) or not isinstance(error, HydraException):
        return None
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            return override
    return None


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
