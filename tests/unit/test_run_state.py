# SPDX-License-Identifier: Apache-2.0
"""Whether a run is going on and how it ended, and the table of `opd ls`."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.errors import ConfigError
from opd_ext.report import runs
from opd_ext.run_state import running, state_of


def _train(folder, seconds):
    with running(folder):
        (folder / "begun").touch()
        time.sleep(seconds)


def test_a_run_is_running_while_its_process_lives_and_stopped_when_it_was_killed(tmp_path):
    assert state_of(tmp_path) is None
    process = multiprocessing.get_context("fork").Process(target=_train, args=(tmp_path, 60))
    process.start()
    end = time.monotonic() + 10
    while not (tmp_path / "begun").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert state_of(tmp_path) == "running"
    with pytest.raises(ConfigError, match="Another process trains in"), running(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert state_of(tmp_path) == "stopped"
    with running(tmp_path):
        pass
    assert state_of(tmp_path) == "finished"


@pytest.mark.parametrize("error, state", [(ValueError("no\nroom"), "failed"), (KeyboardInterrupt(), "stopped")])
def test_a_run_that_ends_early_says_why(tmp_path, error, state):
    with pytest.raises(type(error)), running(tmp_path):
        raise error
    assert state_of(tmp_path) == state
    why = json.loads((tmp_path / "run.json").read_text())["why"]
    assert why == ("no room" if state == "failed" else "KeyboardInterrupt")


def make_run(folder, steps, total, method="crisp", val=None, state=None, monitor=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"data:\n  method: x\nopd:\n  run_dir: {folder}\n  method: {method}\n  teacher:\n    method: y\n"
        f"trainer:\n  total_training_steps: {total}\n"
    )
    lines = [
        {"phase": "train", "step": step, "rollout/accuracy": 0.25, "rollout/tokens_mean": 60.0, "pad": "x" * 3000}
        for step in range(1, steps + 1)
    ]
    if val:
        lines.insert(val[0], {"phase": "val", "step": val[0], "val/accuracy": val[1], "val/tokens_mean": val[2]})
    if monitor:
        step, share = monitor
        lines.insert(step, {"phase": "monitor", "step": step, "monitor/accuracy": share, "monitor/tokens_mean": 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "tr')
    if state:
        (folder / "run.json").write_text(json.dumps({"state": state}))


def test_the_table_shows_step_accuracy_tokens_disk_and_state(tmp_path, monkeypatch):
    make_run(tmp_path / "a", 3, 10)
    make_run(tmp_path / "sub" / "b", 300, 300, "sdpo", val=(20, 0.5, 33.3))  # far from the end of the metrics
    make_run(tmp_path / "c", 5, "null", "trace", state="failed")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "manifest.json").write_text(json.dumps({"sample": {"outputs": {}}, "train": {}}))
    found = {run.folder.name: run for run in map(runs.look, runs.find(tmp_path))}
    shown = {name: (r.method, r.step, r.total, r.accuracy, r.tokens, r.state) for name, r in found.items()}
    assert shown == {
        "a": ("crisp", 3, 10, 0.25, 60.0, "stopped"),
        "b": ("sdpo", 300, 300, 0.5, 33.3, "finished"),
        "c": ("trace", 5, None, 0.25, 60.0, "failed"),
        "p": ("pipeline", 1, 2, None, None, "stopped"),
    }
    assert all(r.disk == sum(f.stat().st_size for f in r.folder.iterdir()) for r in found.values())
    monkeypatch.setenv("OPD_RUNS", str(tmp_path))
    output = CliRunner().invoke(app, ["ls"]).output
    assert "sub/b" in output and "300/300" in output and "50.0" in output
    assert CliRunner().invoke(app, ["ls", str(tmp_path / "a")]).exit_code == 0
    done = CliRunner().invoke(app, ["ls", str(tmp_path / "nowhere")])
    assert done.exit_code == 2 and "there is no folder" in done.output


def test_an_accuracy_of_the_monitor_alone_is_marked(tmp_path):
    make_run(tmp_path / "a", 9, 10, val=(0, 0.5, 33.3), monitor=(8, 0.75))
    make_run(tmp_path / "b", 9, 10, val=(8, 0.5, 33.3), monitor=(4, 0.75))
    found = {run.folder.name: (run.accuracy, run.monitored) for run in map(runs.look, runs.find(tmp_path))}
    assert found == {"a": (0.75, True), "b": (0.5, False)}
    output = CliRunner().invoke(app, ["ls", str(tmp_path)]).output
    assert "75.0*" in output and "50.0" in output and "50.0*" not in output and "* of the monitor" in output


def test_of_a_long_run_the_end_is_read(tmp_path, monkeypatch):
    """Two hundred runs are listed in a moment, however long they were."""
    make_run(tmp_path / "long", 2000, 2000, val=(1999, 0.5, 33.3))
    parsed = []
    monkeypatch.setattr(runs.json, "loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    assert runs.look(tmp_path / "long").step == 2000
    assert 3 <= len(parsed) <= 65_536 // 3000 + 2  # lines of 3,000 characters in the last block
