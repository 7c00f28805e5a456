# SPDX-License-Identifier: Apache-2.0
"""What unit tests share: golden numbers, from a folder that the environment may replace, and quicker compositions."""

import copy
import functools
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from opd_ext import train
from opd_ext.config import compose

DEFAULT_VECTORS = Path(__file__).parents[1] / "vectors"


def pytest_collection_finish():
    """Torch, verl and transformers stay: the garbage collector need not walk through them again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@functools.cache
def load_vectors(method: str) -> dict:
    folder = Path(os.environ.get("OPD_VECTORS_DIR", DEFAULT_VECTORS))
    path = folder / f"{method}.json"
    if not path.is_file():
        pytest.fail(f"{path} does not exist; point OPD_VECTORS_DIR at a folder with {method}.json.", pytrace=False)
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def vectors():
    """``vectors("crisp")`` is the content of ``$OPD_VECTORS_DIR/crisp.json`` (default: ``tests/vectors``)."""
    return load_vectors


@pytest.fixture(autouse=True)
def environment_left_alone():
    """What a test, or verl within it, writes into the environment is taken back: a later test would believe it."""
    with mock.patch.dict(os.environ):
        yield


_compose_presets = functools.cache(lambda name, *choices: hydra.compose(name, list(choices)))


def _compose(name: str, overrides: list[str]) -> DictConfig:
    """``hydra.compose``, whose time goes into presets: values enter a copy of them, by Hydra's own hand."""
    values = [override for override in overrides if re.match(r"[+~]*(?!hydra\.)\w+\.", override)]
    config = copy.deepcopy(_compose_presets(name, *(choice for choice in overrides if choice not in values)))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
    return config


@pytest.fixture
def presets_composed_once(monkeypatch):
    """`compose_config` as it is, but Hydra composes the same choice of presets only once per session."""
    monkeypatch.setattr(compose, "compose", _compose)


@pytest.fixture
def opd_train():
    """``opd_train(*arguments)`` is the exit status of `opd train` in this process, where torch and verl are loaded."""
    return lambda *arguments: train.main(list(arguments))


RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE_INPUTS = ("MODEL", "TEACHER", "DATA_DIR", "TRAIN", "EVAL", "OUT", "GPUS", "RAY_ADDRESS")


def _run_recipe(recipe: str | Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in RECIPE_INPUTS and not name.startswith(("OPD_", "ANNOTATOR"))
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(RECIPES / recipe), *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**inherited, "PATH": path, **variables}, capture_output=True, text=True
    )


@pytest.fixture
def run_recipe():
    """``run_recipe(recipe, *arguments, cwd, **variables)`` runs a script of `recipes/`, or of an absolute path.

    Our `opd` is first on its path, and it inherits nothing that a recipe or Ray would read.
    """
    return _run_recipe


@pytest.fixture
def arguments(tmp_path_factory, tmp_path):
    """``arguments(recipe, *arguments, **variables)``: what the recipe's last command would tell `opd train`.

    The recipe runs for real, in ``tmp_path``, up to `opd`, which only writes down its arguments.
    """
    recorder = tmp_path_factory.mktemp("bin") / "opd"
    recorder.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    recorder.chmod(0o755)

    def record(recipe: str | Path, *arguments: str, **variables: str) -> list[str]:
        path = f"{recorder.parent}:{os.environ['PATH']}"
        answer = _run_recipe(recipe, "--cfg", *arguments, cwd=tmp_path, PATH=path, **variables)
        assert answer.returncode == 0, answer.stderr
        command, *rest = answer.stdout.split("\0")[:-1]
        assert command == "train" and "--cfg" in rest
        return [argument for argument in rest if argument != "--cfg"]

    return record


@pytest.fixture
def composed(arguments, presets_composed_once, tmp_path, monkeypatch):
    """Likewise the configuration: Hydra composes it here, which is quicker than a process that imports torch."""
    monkeypatch.chdir(tmp_path)

    def of(*recipe: str | Path, **variables: str) -> DictConfig:
        overrides = arguments(*recipe, **variables)
        folders = []
        if overrides[0] == "--config-dir":
            _, folder, *overrides = overrides
            folders = [folder]
        with mock.patch.dict(os.environ, variables):  # as `opd` inherits them
            return compose.compose_config(overrides, folders)

    return of
