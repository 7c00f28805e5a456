# SPDX-License-Identifier: Apache-2.0
"""A run whose Ray head is gone says so: Ray itself would end the process from within, without a word of the run.

Every process of a run talks to the head's control store (GCS). When that has not answered for a minute, Ray's core ends
each of them by ``exit(1)``, the driver included, whatever Python code it is in. The driver notices earlier, by asking
whether anybody listens at that address, and has the rest of the minute to take down what it has started.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from opd_ext.errors import RunError

LOOK_SECONDS = 5.0
_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"


def patience() -> float:
    """Seconds without an answer after which a head counts as gone: two thirds of what Ray's core waits."""
    return 2 / 3 * float(os.environ.get(_PATIENCE) or 60)


def listens(address: str, timeout: float = LOOK_SECONDS) -> bool:
    """Whether anybody accepts a connection at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout):
            return True
    except OSError:
        return False


def _address() -> str | None:
    """Of the head that this process has joined; None before that."""
    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


@contextmanager
def head_watched(address: Callable[[], str | None] = _address, every: float = LOOK_SECONDS) -> Iterator[None]:
    """Within the block a head that has gone interrupts whatever the main thread waits for.

    Raises:
        RunError: one sentence. Only the main thread can be interrupted, so in another one nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, gone = threading.Event(), list[str]()

    def watch() -> None:
        heard = time.monotonic()
        while not over.wait(every):
            where = address()
            if where is None or listens(where):
                heard = time.monotonic()
            elif (silent := time.monotonic() - heard) > patience() and not over.is_set():
                gone.append(f"Ray's head at {where} has not answered for {silent:.0f} s, so that the run cannot go on")
                # Again and again: what is interrupted may swallow it.
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def interrupt(*_: Any) -> None:
        if gone and not over.is_set():
            raise KeyboardInterrupt  # the only exception that Ray lets through while it waits

    # Not SIGINT, which a shell has its background processes ignore.
    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not gone:
            raise
        raise RunError(
            f"{gone[0]}: its process or node has died (`ray status` asks it; its logs are on that node). The command "
            "that started the run goes on from the last checkpoint."
        ) from None
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
