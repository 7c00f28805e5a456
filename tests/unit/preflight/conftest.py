# SPDX-License-Identifier: Apache-2.0
"""A small right world to spoil: a real model of half a million weights, 64 problems, and a run that starts nothing."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

import pandas as pd
import pytest
import ray

from opd_ext import train
from opd_ext.bridge import inputs, validation  # noqa: F401 (verl is loaded once)
from opd_ext.tinymath.shipped import FOLDER


def row(i: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of verl's format; a change of ``...`` takes a column out."""
    whole = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"What is {i}+1?"}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"index": i, "question": f"{i}+1", "solution": "Count on."},
    }
    return {name: value for name, value in (whole | changes).items() if value is not ...}


def rows(n: int = 64, **changes: Any) -> list[dict[str, Any]]:
    return [row(i, **changes) for i in range(n)]


class World:
    """Files in one folder; every writer returns the path."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def parquet(self, content: Iterable[dict], name: str = "data.parquet") -> Path:
        pd.DataFrame(list(content)).to_parquet(self.folder / name)
        return self.folder / name

    def table(self, parquet: Path, n: int) -> Path:
        """The first ``n`` rows of a table, in its place: of none, the columns are left."""
        pd.read_parquet(parquet).head(n).to_parquet(parquet)
        return parquet

    def file(self, name: str, content: str | bytes = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def lines(self, content: Iterable[Any], name: str = "data.jsonl") -> Path:
        return self.file(name, "".join(json.dumps(each) + "\n" for each in content))

    def model(self, spoil: Callable[[Path], object] = lambda folder: None, name: str = "model") -> Path:
        shutil.copytree(FOLDER / "base", self.folder / name, dirs_exist_ok=True)
        spoil(self.folder / name)
        return self.folder / name


def config_with(**changes: Any) -> Callable[[Path], object]:
    """Spoils ``config.json`` of a model."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "world")


@pytest.fixture(scope="session")
def _right(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("right"))
    return [
        f"actor_rollout_ref.model.path={made.model()}",
        f"data.train_files={made.parquet(rows(), 'train.parquet')}",
        f"data.val_files={made.parquet(rows(8), 'val.parquet')}",
        "opd.warm_python=false",
    ]


@pytest.fixture
def start(_right, tmp_path, monkeypatch, capfd):
    """``start(*words)``: `opd train` of the right world with these words, up to where Ray would start.

    Returns the exit status, what it said on standard error, and whether it would have started.
    """
    started = []
    monkeypatch.setattr(train, "_train", lambda config, opd: started.append(config))

    def main(*words: str) -> tuple[int, str, list]:
        with mock.patch.dict(os.environ):
            status = train.main([*_right, f"opd.run_dir={tmp_path / 'run'}", *words])
        assert not ray.is_initialized()
        printed = capfd.readouterr()
        return status, printed.err, started, printed.out

    return main
