# SPDX-License-Identifier: Apache-2.0
"""What the files at the root tell the next person is so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import opd_ext
from opd_ext.moved import MOVED
from opd_ext.teacher import get_teacher

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "opd_ext"


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_what_a_page_names_exists(name):
    text = read(name)
    paths = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:opd_ext|tests|recipes|examples)/[\w./]+)`", text)
    for path in (path for path in paths if "NAME" not in path):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_the_guides_teacher_is_one(monkeypatch):
    registry = get_teacher.__self__
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    (code,) = re.findall(r"```python\n(.*?)```", read("CONTRIBUTING.md"), re.DOTALL)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "guide"})
    teacher = get_teacher("late")(start=10)
    assert [teacher.share(step, updates=1) for step in (9, 10, 11)] == [0.0, 0.05, 0.05]
    assert teacher.share(11, updates=0) == 0.0


def test_hooks_have_the_pins_of_the_stack():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"] if pin.startswith("ruff")}
    for stack in ("cpu", "gpu"):
        assert pins <= set(read(f"opd_ext/constraints/{stack}.txt").splitlines())


def test_a_citation_names_this_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == opd_ext.__version__


def test_every_name_that_will_go_is_announced():
    section = read("CHANGELOG.md").split("### Deprecated names, which go with 0.3")[1].split("\n## ")[0]
    announced = set(re.findall(r"`(opd_ext[\w.]+)`", section))
    assert announced == set(MOVED)


@pytest.mark.parametrize(("setup", "tests"), [(1, 0), (0, 1), (0, 0)])
def test_continuous_integration_fails_when_a_part_of_it_does(tmp_path, setup, tests):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "setup.sh").write_text(f"exit {setup}\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in *slow*) exit 0 ;; *) exit {tests} ;; esac\n')
    python.chmod(0o755)
    assert bool(subprocess.run([tmp_path / ".ci" / "run"]).returncode) == bool(setup or tests)
