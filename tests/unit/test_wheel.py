# SPDX-License-Identifier: Apache-2.0
"""The wheel holds everything that the commands need: whoever has only the wheel can run the quick start."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built as ``pip wheel .`` builds it, with the build tools that are installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, ROOT]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (built,) = folder.glob("opd_ext-*.whl")
    return built


@pytest.fixture(scope="module")
def opd(wheel, tmp_path_factory):
    """``opd(*arguments)``: the command of an environment that has this wheel and borrows its dependencies from here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel]
    subprocess.run(command, check=True)
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "OPD_HOME": str(folder / "home")}
    where = subprocess.run(
        [python, "-c", "import opd_ext; print(opd_ext.__file__)"], env=env, cwd=folder, capture_output=True, text=True
    )
    assert where.stdout.startswith(target), where.stdout + where.stderr  # and not the checkout

    def run(*arguments: str) -> str:
        command = [python, "-m", "opd_ext.cli", *arguments]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())
    files = subprocess.run(["git", "ls-files", "opd_ext"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("no git checkout")
    assert set(files) <= there


def test_the_recipes_are_in_the_wheel_without_their_figures(wheel):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("opd_ext/recipes/")}
    recipes = {
        str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*") if path.suffix in (".sh", ".md", ".yaml")
    }
    assert there == {f"opd_ext/{path}" for path in recipes}


def test_methods_are_listed(opd):
    assert "crisp" in opd("methods") and "srpo" in opd("methods")


def test_a_configuration_composes(opd):
    assert "method: crisp" in opd("train", "method=crisp", "scale=cpu_tiny", "--cfg")


def test_the_miniature_world_unpacks_and_the_run_that_needs_it_is_planned(opd):
    assert "base ready in" in opd("data", "tinymath")
    plan = opd("train", "method=crisp", "scale=cpu_tiny", "--dry-run")
    assert "Nothing was started" in " ".join(plan.split())


def test_a_published_recipe_is_copied_and_planned(opd):
    answer = opd("new", "mine", "--from", "crisp")
    assert "mine/qwen3_8b.sh trains into" in answer and "runs/mine-cpu_tiny" in answer
    assert "method: mine" in opd("train", "--config-dir", "mine/config", "recipe=mine/qwen3_8b", "--cfg")
