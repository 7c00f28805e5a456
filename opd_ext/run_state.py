# SPDX-License-Identifier: Apache-2.0
"""Whether a run is going on and how it ended: a lock that goes with its process, and a word beside it (``run.json``).

A killed process says nothing any more, but its lock is free.
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_ext.errors import ConfigError
from opd_ext.files import write_whole

LOCK, STATE = ".lock", "run.json"
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"


@contextmanager
def running(run_dir: Path) -> Iterator[None]:
    """While a process trains in ``run_dir``, no other one does; afterwards ``run.json`` says how it ended.

    Raises:
        ConfigError: another process trains there.
    """
    with (run_dir / LOCK).open("w") as lock:
        for _ in range(10):  # whoever lists runs looks at the lock by taking it for a moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        else:
            raise ConfigError(f"Another process trains in {run_dir}: wait for it, or choose another opd.run_dir.")
        _say(run_dir, RUNNING)
        try:
            yield
        except Exception as error:
            _say(run_dir, FAILED, " ".join(str(error).split()))
            raise
        except BaseException as interrupt:
            _say(run_dir, STOPPED, type(interrupt).__name__)
            raise
        _say(run_dir, FINISHED)


def state_of(run_dir: Path) -> str | None:
    """One of the words above; None for a run of an older release that is not going on."""
    if _is_locked(run_dir / LOCK):
        return RUNNING
    try:
        said = json.loads((run_dir / STATE).read_text())["state"]
    except (OSError, ValueError, KeyError):
        return None
    return STOPPED if said == RUNNING else said


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or a file system without
        return False
    return False


def _say(run_dir: Path, state: str, why: str = "") -> None:
    said = {"state": state, "why": why, "node": platform.node(), "process": os.getpid(), "time": time.time()}
    write_whole(run_dir / STATE, json.dumps(said, indent=2) + "\n")
