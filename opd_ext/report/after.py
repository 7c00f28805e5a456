# SPDX-License-Identifier: Apache-2.0
"""The last act of a run: days of training do not end in a traceback because a report could not be written."""

import sys
from collections.abc import Callable


def after_run(write: Callable[[], None], again: str) -> None:
    """Write a report; if that fails, for whatever reason, say so and how to repeat it. The run has succeeded.

    Args:
        again: the command that repeats the report alone.
    """
    try:
        write()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"WARNING: the run is complete, its report is not ({reason}). To repeat it: {again}", file=sys.stderr)
