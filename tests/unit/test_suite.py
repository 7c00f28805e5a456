# SPDX-License-Identifier: Apache-2.0
"""The suite itself: slow tests take turns, and nothing is forgotten."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import TESTS, pytest_xdist_auto_num_workers, shuffled

ROOT = TESTS.parent


def test_a_turn_leaves_no_test_out_and_every_test_comes_first_in_some():
    names = list("abcdef")
    orders = [shuffled(names, str(turn)) for turn in range(60)]
    assert all(sorted(order) == names for order in orders)
    assert {order[0] for order in orders} == set(names) == {order[-1] for order in orders}
    assert shuffled(names, "7") == shuffled(names[::-1], "7")


def test_a_turn_keeps_the_tests_of_a_file_together():
    names = [f"{file}::{test}" for test in "xyz" for file in "abcd"]
    for turn in map(str, range(20)):
        files = [name[0] for name in shuffled(names, turn)]
        assert sum(one != other for one, other in zip(files, files[1:], strict=False)) == 3


@pytest.mark.parametrize(
    ("arguments", "processes"), [(["tests"], 2), (["tests/unit"], 0), (["tests/unit/test_cli.py"], 0)]
)
def test_only_the_whole_suite_is_spread_over_processes(arguments, processes, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pytest_xdist_auto_num_workers(SimpleNamespace(args=arguments)) == processes


def test_continuous_integration_calls_the_readmes_test_command():
    command = "bash setup.sh --dev && .venv/bin/python -m pytest tests"
    assert command in (ROOT / "README.md").read_text().splitlines()
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_test_file_is_found_by_its_name():
    strays = [
        path for path in Path(TESTS).rglob("*.py") if "def test_" in path.read_text() and "test_" not in path.name
    ]
    assert not strays
