# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs, at a tiny size and in this process: one that fails at all sizes measures nothing."""

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"

# Writes what a run's console has, and spends enough CPU time to be counted.
STAND_IN = """
import sys, time
from pathlib import Path

folder = Path(next(word for word in sys.argv if word.startswith("opd.run_dir=")).partition("=")[2])
folder.mkdir()
for line in ("the stack is up", "val 0"):
    until = time.process_time() + 0.4
    while time.process_time() < until:
        pass
    with (folder / "console.log").open("a") as console:
        print(line, file=console)
time.sleep(0.5)
"""


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("head")`` is that module, whose measurements stay in this process."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name):
        module = importlib.import_module(name)
        if hasattr(module, "in_fresh_process"):
            monkeypatch.setattr(module, "in_fresh_process", lambda call, *args, environment=None: call(*args))
        return module

    before, joined = set(sys.modules), torch.distributed.is_initialized()
    with mock.patch.dict(os.environ):
        yield load
    if torch.distributed.is_initialized() and not joined:
        torch.distributed.destroy_process_group()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def test_the_head_is_measured_against_a_dense_one(benchmark, tmp_path):
    out = tmp_path / "head.json"
    benchmark("head").main(n=32, v=128, h=16, chunk_size=16, repeats=2, date="2026-01-01", out=out)
    result = json.loads(out.read_text())
    assert max(result["max_relative_gradient_difference"].values()) < 1e-5
    assert min(*result["seconds_fastest"].values(), result["time_ratio_median"]) > 0
    assert result["date"] == "2026-01-01" and result["hardware"]["cores"] == os.cpu_count()


def test_an_update_of_crisp_is_measured_against_one_of_grpo(benchmark, tmp_path):
    out = tmp_path / "step.json"
    sizes = {"batch": 2, "prompt": 4, "teacher_prompt": 6, "response": 8, "budget": 32}
    benchmark("step").main(**sizes, vocab=64, hidden=64, layers=1, repeats=1, out=out)
    result = json.loads(out.read_text())
    assert min(result["seconds_fastest"].values()) > 0
    # Counted by hand: P = 64 (64 + 2 * 64 + 64 + 3 * 192) weights; see the formula in the module's docstring.
    trunk, head = result["trunk_parameters"], 64 * 64
    assert trunk == 64 * (64 + 2 * 64 + 64 + 3 * 192)
    expected = (3 * trunk * 24 + trunk * 28 + 4 * head * 16) / (3 * trunk * 24 + 3 * head * 24)
    assert result["predicted_ratio"] == pytest.approx(expected)


def test_a_graded_test_is_measured_against_the_bare_interpreter_and_verl(benchmark, tmp_path):
    out = tmp_path / "programs.json"
    benchmark("programs").main(repeats=1, tests=2, out=out)
    result = json.loads(out.read_text())
    arms = result["milliseconds_fastest"]
    assert {"bare interpreter", "verl prime_code"} <= set(arms) and min(arms.values()) > 0
    assert set(result["overhead_milliseconds_median"]) == set(arms) - {"bare interpreter", "verl prime_code"}


def test_the_time_before_the_first_step_is_measured_process_by_process(benchmark, tmp_path, capsys):
    startup, program = benchmark("startup"), tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    result = startup.measure(["opd.seed=2"], [str(program)])
    assert list(result["marks_s"]) == ["stack is up", "first step begins", "run ended"]
    assert [row["process"] for row in result["processes"]] == ["stand_in.py"]
    assert result["processes"][0]["cpu_s"] >= 0.3
    startup.show(result)
    assert "first step begins:" in capsys.readouterr().out


def test_the_run_whose_start_is_measured_is_accepted(benchmark, tmp_path, opd_train):
    assert opd_train(*benchmark("startup").settings(tmp_path / "run", []), "--dry-run") == 0


def test_a_result_is_there_as_a_whole_and_says_on_what_it_was_measured(benchmark, tmp_path):
    measure = benchmark("measure")
    measure.reset_resident_peak()
    assert 0 < measure.resident("VmRSS") <= measure.resident("VmHWM")
    assert measure.timed(lambda: sum(range(10_000)), "cpu") > 0
    measure.write_json(tmp_path / "new" / "result.json", measure.provenance("cpu", "", "rich"))
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert {"date", "hardware", "torch", "rich"} == set(written) and len(list((tmp_path / "new").iterdir())) == 1
