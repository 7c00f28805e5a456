# SPDX-License-Identifier: Apache-2.0
"""Where a user's files lie: worlds, models and data sets, and the variables of the environment that say so."""

import os
from pathlib import Path

from opd_ext.errors import ConfigError


def home() -> Path:
    """The folder of worlds and models: ``$OPD_HOME``, or ``~/.cache/opd_ext`` if that is empty or not set."""
    return Path(os.environ.get("OPD_HOME") or Path.home() / ".cache" / "opd_ext")


def settle() -> None:
    """Have YAML files read the environment as :func:`home` does; Ray and Hugging Face look below HOME, too.

    A variable that is empty counts as not set: to YAML it would be a folder at the root. A service may run without
    HOME.

    Raises:
        ConfigError: nobody knows a home folder.
    """
    for name in ("OPD_HOME", "OPD_RUNS"):
        if not os.environ.get(name, "unset"):
            del os.environ[name]
    if not os.environ.get("HOME"):
        try:
            os.environ["HOME"] = str(Path.home())
        except RuntimeError:
            raise ConfigError("HOME is not set and this user has no home folder: set HOME to a folder.") from None
