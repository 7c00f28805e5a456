# SPDX-License-Identifier: Apache-2.0
"""Commands, YAML and scripts agree on where a user's files lie, an empty variable included."""

from pathlib import Path

import pytest

from opd_ext.config.compose import compose_config
from opd_ext.home import home
from opd_ext.pipelines.settings import compose_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig


@pytest.mark.parametrize("value", ["", None, "/elsewhere"])
def test_every_reader_of_the_environment_finds_the_same_folder(value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("OPD_HOME", "OPD_RUNS"):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    files = Path(value) if value else Path.home() / ".cache" / "opd_ext"
    runs = Path(value) if value else tmp_path / "runs"
    assert home() == files
    trained = compose_config(["method=crisp"])
    assert (trained.opd.world, Path(trained.opd.run_dir).parent) == (str(files / "tinymath"), runs)
    piped = compose_pipeline("ssd", SSDConfig, [])
    assert (piped.world, Path(piped.run_dir).parent) == (str(files / "tinymath"), runs)
