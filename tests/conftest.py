# SPDX-License-Identifier: Apache-2.0
"""How the suite is spread over processes, and in which order slow tests take their turns.

Shapes in signatures are checked at every call, here and nowhere else: production code carries no decorator.
"""

import hashlib
import os
import time
from pathlib import Path

import pytest

# Before torch is imported: on a busy machine a thread that spins for another one costs ten times what it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.shapes import check_shapes

TESTS = Path(__file__).parent

check_shapes()


@pytest.fixture(scope="session", autouse=True)
def nobodys_home(tmp_path_factory):
    """No test finds the worlds and models of whoever runs it: one that needs some makes them in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_HOME", str(tmp_path_factory.mktemp("nobody")))
        yield


def pytest_addoption(parser):
    parser.addoption("--slow-turn", help="slow tests run in an order of their own for every value of this")
    parser.addoption("--slow-minutes", type=float, help="begin no further slow test after this many minutes")


def pytest_xdist_auto_num_workers(config):
    """The whole suite takes two processes: real runs, which share one stack, and everything else beside them.

    Whoever names a file or a test gets it in this process, at once.
    """
    return 2 if [Path(argument).resolve() for argument in config.args] == [TESTS] else 0


def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class StackApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "stack" if nodeid.startswith("tests/stack/") else nodeid

    return StackApart(config, log)


def pytest_collection_modifyitems(config, items):
    if (turn := config.getoption("--slow-turn")) is not None:
        slow = {item.nodeid: item for item in items if item.get_closest_marker("slow")}
        others = [item for item in items if item.nodeid not in slow]
        items[:] = others + [slow[name] for name in shuffled(list(slow), turn)]


def shuffled(names: list[str], turn: str) -> list[str]:
    """``names`` in the order that belongs to ``turn``: none is last for ever, however far the turns lie apart.

    Tests of a file stay together, since what they share is made once per file, and is most of their time.
    """

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{turn}/{name}".encode()).digest()

    return sorted(names, key=lambda name: (place(name.partition("::")[0]), place(name)))


def pytest_sessionstart(session):
    session.config.began = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--slow-minutes")
    if minutes is not None and time.monotonic() - item.config.began > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes for slow tests are over; in another turn it comes earlier")
