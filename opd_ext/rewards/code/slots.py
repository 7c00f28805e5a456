# SPDX-License-Identifier: Apache-2.0
"""As many tests at a time as this machine has cores, over all processes that grade.

verl grades in several workers of a node, none of which knows the others. Each would start a process per core, and tests
that wait for a core run out of time. A slot is a locked file: the kernel gives it back when its holder dies.
"""

import fcntl
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_RETRY_SECONDS = 0.005


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def slot() -> Iterator[int]:
    """Wait for one of this user's slots on this machine, and hold it; its number is nobody else's meanwhile."""
    numbers = list(range(max(cores(), 1)))
    random.shuffle(numbers)
    while True:
        for number in numbers:
            handle = os.open(_folder() / str(number), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                continue
            try:
                yield number
            finally:
                os.close(handle)
            return
        time.sleep(_RETRY_SECONDS)


@cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"opd-ext-slots-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of yours")
    return folder
