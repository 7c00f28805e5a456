# SPDX-License-Identifier: Apache-2.0
"""From YAML files and overrides to one resolved configuration."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext import home
from opd_ext.config import maths_grader as _maths_grader  # noqa: F401  (its resolver)
from opd_ext.config import processor as _processor  # noqa: F401  (its resolver)
from opd_ext.config import served as _served  # noqa: F401  (its resolvers)
from opd_ext.config.overrides import check_folders, check_groups, keys_of, quoted, readable
from opd_ext.config.refusals import refusal
from opd_ext.errors import ConfigError

CONFIG_DIR = Path(__file__).parent
_OPEN = ("opd.", "reward.custom_reward_function.reward_kwargs.")


def compose_config(overrides: list[str], config_dirs: Sequence[Path] = ()) -> DictConfig:
    """verl's ``ppo_trainer`` + method + scale + ``overrides``, composed by Hydra and fully resolved.

    Args:
        overrides: in Hydra's grammar, but keys of `opd` and arguments of the grader need no `+`.
        config_dirs: further folders with presets of the same groups (``method/``, ``scale/``, ``tuning/``).

    Raises:
        ConfigError: for an override that Hydra cannot apply.
    """
    home.settle()
    check_folders(config_dirs)
    check_groups(overrides, config_dirs)
    search_path = _search_path(config_dirs)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            config = compose("opd", overrides=[search_path, *(_addable(readable(each)) for each in overrides)])
        if not isinstance(config.opd.run_dir, str) or not config.opd.run_dir.strip():
            raise ConfigError(f"opd.run_dir={config.opd.run_dir} must be a text: name a folder.")
        config.opd.run_dir = str(Path(config.opd.run_dir).expanduser().absolute())  # what follows from it included
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise refusal(error, overrides, "opd train", known=_known_keys) from None
    except ConfigError:
        raise
    except ValueError as error:  # Hydra's, of a group to which something else than a name is given
        raise ConfigError(f"The configuration does not compose: {error}; write KEY=VALUE.") from None
    return config


def _search_path(config_dirs: Sequence[Path]) -> str:
    """The override that has Hydra look into verl's presets and those of the user."""
    # Located without importing it: verl settles its platform at import, and the platform is part of this config.
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        raise ConfigError("verl is not installed in this environment; run `bash setup.sh`.")
    folders = [Path(verl.origin).parent / "trainer" / "config", *(Path(folder).absolute() for folder in config_dirs)]
    return f"hydra.searchpath=[{','.join(quoted(f'file://{folder}') for folder in folders)}]"


def _known_keys() -> list[str]:
    """Choices and keys of the configuration without overrides."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        config = compose("opd", overrides=[_search_path([])])
    groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir()]
    keys: Any = OmegaConf.to_container(config)
    return [*groups, *keys_of(keys)]


def _addable(override: str) -> str:
    """Keys of `opd` that a preset leaves at their default can be set like any other; the schema knows which exist.

    So can a grader's arguments, of which verl's YAML has none.
    """
    return f"++{override}" if override.startswith(_OPEN) else override
