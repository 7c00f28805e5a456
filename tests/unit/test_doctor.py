# SPDX-License-Identifier: Apache-2.0
"""`opd doctor`: every fault becomes one sentence and exit status 1, and the pins have one source."""

import io
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from rich.console import Console

from opd_ext import doctor, versions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """Installed distributions are looked up along sys.path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_every_distribution_has_one_exact_pin(stack):
    lines = (ROOT / "opd_ext" / "constraints" / f"{stack}.txt").read_text().splitlines()
    requirements = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', line) for line in requirements)
    # One line for all Pythons, or one on each side of 3.11: never two that hold at once.
    keys = Counter()
    for line in requirements:
        name, _, marker = line.partition(";")
        name = canonicalize_name(name.split("==")[0])
        keys.update([(name, side) for side in ("<", ">=") if not marker or f" {side} " in marker])
    assert max(keys.values()) == 1


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_what_the_package_fixes_is_what_the_constraints_pin(stack):
    wanted = versions.pins(stack)
    declared = re.search(rf"^{stack} = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    exact = dict(re.findall(r'"([\w.-]+)(?:\[\w+\])?==([\w.]+)', declared))
    assert exact["torch"]
    assert {name: wanted[canonicalize_name(name)] for name in exact} == exact


def test_both_stacks_pin_the_same_verl():
    assert versions.pins("cpu")["verl"] == versions.pins("gpu")["verl"] == "0.9.1"


def test_a_local_suffix_names_a_build_of_the_same_version():
    assert versions.Comparison("torch", "2.13.0", "2.13.0+cpu").agrees
    assert not versions.Comparison("torch", "2.13.0", "2.13.1").agrees
    assert not versions.Comparison("torch", "2.13.0", None).agrees


def test_a_missing_distribution_is_a_problem_that_names_the_remedy(nothing_installed):
    checks = {check.subject: check for check in doctor.check_versions("gpu")}
    assert checks["vllm"].found == "missing"
    assert checks["vllm"].problem == "vllm is missing, tested with 0.24.0; run `bash setup.sh --gpu`."


def test_the_gpu_stack_without_a_gpu_is_a_problem():
    assert doctor.check_devices("gpu", []).problem
    assert doctor.check_devices("cpu", []).problem is None


def test_equal_gpus_are_counted():
    found = doctor.check_devices("gpu", ["H200, 143771 MiB"] * 8).found
    assert found.startswith("8 x H200, 143771 MiB; CPU, ")


def test_missing_shared_memory_is_a_problem(tmp_path):
    assert "does not exist" in doctor.check_shared_memory(tmp_path / "none").problem


def test_an_environment_without_the_package_is_told_to_install_it(nothing_installed):
    with pytest.raises(LookupError, match="opd-ext is not installed in this environment"):
        doctor.load_plugin()


def test_an_error_of_the_plugin_is_shown_and_fails_the_command(tmp_path, monkeypatch):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nopd_ext = broken_plugin:register\n")
    (tmp_path / "broken_plugin.py").write_text("def register():\n    raise RuntimeError('no such seam')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    answer = subprocess.run([sys.executable, "-m", "opd_ext.cli", "doctor"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "The verl plugin does not load: RuntimeError: no such seam" in answer.stdout


def test_problems_become_sentences_and_the_exit_status():
    good = doctor.Check("memory", "20 GiB free")
    bad = doctor.Check("disk", "1 GiB free", ">= 5 GiB", "The disk is full; free [some] space.")
    page = io.StringIO()
    console = Console(file=page, width=80)
    assert doctor.tell([good, good], console) == 0
    assert "problem" not in page.getvalue()
    assert doctor.tell([good, bad], console) == 1
    assert page.getvalue().splitlines()[-1] == "The disk is full; free [some] space."
