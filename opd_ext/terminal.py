# SPDX-License-Identifier: Apache-2.0
"""What commands print on. Names of runs, files and data sets are the user's: ``[/x]`` and ``:x:`` in them are text."""

import sys
from typing import Any

from rich.console import Console

LOG_WIDTH = 120


def terminal(log_width: int | None = None, **options: Any) -> Console:
    """A console that takes text as it stands; a style is given as ``style=`` or as a ``Text``, never as markup.

    Args:
        log_width: columns where the output is no terminal: a log has no width of its own, and rich would assume 80.
        options: of ``rich.console.Console``.
    """
    if log_width and not sys.stdout.isatty():
        options.setdefault("width", log_width)
    return Console(markup=False, emoji=False, **options)
