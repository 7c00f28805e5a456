# SPDX-License-Identifier: Apache-2.0
"""A head that is gone ends the wait for it; one that is slow, comes back or was never joined does not."""

import socket
import threading
import time

import pytest

from opd_ext.bridge.cluster_head import head_watched, listens
from opd_ext.errors import RunError

EVERY = 0.02


@pytest.fixture
def head(monkeypatch):
    """A port at which somebody listens, and whose patience is a fifth of a second."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "0.3")
    server = socket.create_server(("127.0.0.1", 0))
    yield server
    server.close()


def address(server: socket.socket) -> str:
    return "{}:{}".format(*server.getsockname())


def test_a_head_that_is_gone_interrupts_what_waits_and_is_named(head):
    where = address(head)
    threading.Timer(0.1, head.close).start()
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"^Ray's head at {where} has not answered for .*last checkpoint\.$"):
        with head_watched(lambda: where, EVERY):
            time.sleep(20)
            pytest.fail("nothing interrupted it")
    assert time.monotonic() - began > 0.2, "it had no time to come back"


def test_a_head_that_comes_back_in_time_is_not_lost(head):
    where, port = address(head), head.getsockname()[1]
    back = []

    def restart():
        head.close()
        assert not listens(where)
        back.append(socket.create_server(("127.0.0.1", port)))

    threading.Timer(0.1, restart).start()
    with head_watched(lambda: where, EVERY):
        time.sleep(0.6)
    back[0].close()


def test_before_a_head_is_joined_nobody_misses_it(head):
    asked = []
    with head_watched(lambda: asked.append(1), EVERY):  # whose answer is None
        time.sleep(0.4)
    assert len(asked) > 2


def test_an_interrupt_by_the_user_stays_one(head):
    with pytest.raises(KeyboardInterrupt), head_watched(lambda: address(head), EVERY):
        raise KeyboardInterrupt
