# SPDX-License-Identifier: Apache-2.0
"""How the suite is spread over processes, and which slow tests a run of continuous integration has time for."""

import math
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--slow-turn", type=int, help="where to begin among the slow tests: any number, another each time")
    parser.addoption("--slow-minutes", type=float, help="begin no further slow test after this many minutes")


def pytest_xdist_auto_num_workers(config):
    """The whole suite takes two processes: real runs, which share one stack, and everything else beside them.

    Whoever names a file or a test gets it in this process, at once.
    """
    return 2 if [Path(argument).resolve() for argument in config.args] == [TESTS] else 0


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    for item in items:
        if TESTS / "stack" in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("stack"))
    if (turn := config.getoption("--slow-turn")) is not None:
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow] + rotated(slow, turn)


def rotated(items: list, turn: int) -> list:
    """``items`` from another place on for every ``turn``.

    Steps of the golden ratio come near every place soon, whatever the distance between the turns of two landings is.
    """
    first = int(len(items) * math.modf(turn * (math.sqrt(5) - 1) / 2)[0])
    return items[first:] + items[:first]


def pytest_sessionstart(session):
    session.config.began = time.monotonic()


def pytest_runtest_setup(item):
    minutes = item.config.getoption("--slow-minutes")
    if minutes is not None and time.monotonic() - item.config.began > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes for slow tests are over; another turn begins elsewhere")
