# SPDX-License-Identifier: Apache-2.0
"""A run whose Ray head is gone says so: Ray itself would end the process from within, without a word of the run.

Every process of a run talks to the head's control store (GCS). When that has not answered for a minute, Ray's core ends
each of them by ``exit(1)``, the driver included, whatever Python code it is in. The driver notices earlier, by asking
whether anybody listens at that address, and has the rest of the minute to take down what it has started.
"""

import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import ray

from opd_ext.bridge.interrupt import watched
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


class Head:
    """Looks whether the head of a run is there.

    Args:
        address: ``host:port`` of its control store, None before this process has joined it.
    """

    def __init__(self, address: Callable[[], str | None] = _address):
        self._address, self._heard = address, time.monotonic()

    def look(self) -> None:
        """Ask once.

        Raises:
            RunError: nobody has answered for too long; one sentence.
        """
        where, now = self._address(), time.monotonic()
        if where is None or listens(where):
            self._heard = now
        elif (silent := now - self._heard) > patience():
            raise RunError(
                f"Ray's head at {where} has not answered for {silent:.0f} s, so that the run cannot go on: its process "
                "or node has died (`ray status` asks it; its logs are on that node). The command that started the run "
                "goes on from the last checkpoint."
            )


def head_watched(
    address: Callable[[], str | None] = _address, every: float = LOOK_SECONDS
) -> AbstractContextManager[None]:
    """Within the block a head that is gone interrupts whatever the main thread waits for; see :func:`watched`.

    While Ray waits it lets :class:`KeyboardInterrupt` through and nothing else.
    """
    return watched(Head(address).look, every, "head", disguise=KeyboardInterrupt)
