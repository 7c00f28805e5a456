# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs, at a tiny size and in this process: one that fails at all sizes measures nothing."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch

from opd_ext.context import prompts
from opd_ext.tinymath import shipped
from opd_ext.tinymath.levels import LONG

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


# Writes what a run of five steps has measured.
STEPS = """
import json, sys
from pathlib import Path

folder = Path(next(word for word in sys.argv if word.startswith("opd.run_dir=")).partition("=")[2])
folder.mkdir()
steady = 1.0 if "asynchronous=one_step_off" in sys.argv else 2.0
lines = [{"phase": "train", "timing_s/step": s} for s in (300.0, 200.0, steady, steady, 100.0)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


# A process that forks another, which shares what it has and takes more.
TREE = """
import os, sys

shared = b"x" * 60_000_000
if not os.fork():
    own = b"y" * 100_000_000
    print("ready", flush=True)
sys.stdin.read()
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


def test_the_head_is_measured_against_a_dense_one_and_against_liger_where_that_is(benchmark, tmp_path, capsys):
    out, there = tmp_path / "head.json", importlib.util.find_spec("liger_kernel") is not None
    benchmark("head").main(n=32, v=128, h=16, chunk_size=16, repeats=2, date="2026-01-01", out=out)
    result = json.loads(out.read_text())
    assert max(result["max_relative_gradient_difference"].values()) < 1e-5
    assert min(*result["seconds_fastest"].values(), result["time_ratio_median"]) > 0
    arms = {"dense", "head", *(["liger"] if there else [])}
    assert set(result["extra_memory_bytes"]) == set(result["time_over_products"]) == arms
    assert all(max(found.values()) < 1e-5 for found in result["max_relative_gradient_difference_of"].values())
    printed = capsys.readouterr().out
    assert "time / products" in printed and ("liger-kernel, because it is not installed" in printed) != there
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


def test_an_update_is_measured_at_the_sizes_of_a_known_model(benchmark, tmp_path):
    from opd_ext.plan.shapes import model_shape

    step, out = benchmark("step"), tmp_path / "step.json"
    sizes = {"batch": 2, "prompt": 4, "teacher_prompt": 6, "response": 8, "budget": 32}
    step.main(**sizes, model="tinymath/base", repeats=1, out=out)
    result, shape = json.loads(out.read_text()), model_shape("tinymath/base")
    found = result["setting"]
    assert (found["vocab"], found["hidden"], found["layers"]) == (shape.vocabulary, shape.hidden, shape.layers)
    norms = shape.layers * (2 * shape.hidden + 2 * 32) + shape.hidden
    assert result["trunk_parameters"] == shape.parameters - 2 * shape.head - norms
    for name in ("nobodys", "Qwen3-30B-A3B"):
        with pytest.raises(step.typer.BadParameter, match=f"{name} is no dense model"):
            step.main(**sizes, model=name, out=tmp_path / "other.json")


def test_what_the_trainer_process_does_with_rollouts_is_measured_part_by_part(benchmark, tmp_path):
    from opd_ext.bridge import rollouts

    out, queue = tmp_path / "driver.json", rollouts.tq
    benchmark("driver").main(responses=8, mean=64, limit=128, out=out)
    result = json.loads(out.read_text())
    assert list(result["cpu_seconds"]) == ["read_rows", "read_tokens", "write ids", "write texts"]
    assert 8 < result["tokens"] <= 8 * 128 and result["tokens_per_second"] > 0 and rollouts.tq is queue


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


def test_step_rates_are_compared_round_by_round(benchmark, tmp_path):
    """Of a stand-in whose steps take 2 s, and 1 s one step off; the steps that do not count take minutes."""
    program = tmp_path / "stand_in.py"
    program.write_text(STEPS)
    found = benchmark("step_rate").measure(5, 2, 0.0, ["opd.seed=2"], [str(program)])
    assert found["ratios"] == [0.5, 0.5] and found["ratio"] == 0.5
    assert found["rounds"][1]["one step off"] == dict.fromkeys(("gen", "update_actor", "drain"), 0.0) | {
        "update_weights": 0.0,
        "step": 1.0,
    }


@pytest.mark.parametrize("arm", ["synchronous", "one step off"])
def test_the_runs_whose_steps_are_measured_are_accepted(benchmark, tmp_path, opd_train, arm):
    step_rate = benchmark("step_rate")
    assert opd_train(*step_rate.settings(tmp_path / "run", 4, 1.0, step_rate.ARMS[arm]), "--dry-run") == 0


def test_the_memory_of_a_run_is_that_of_every_process_below_it_once(benchmark, capsys):
    memory = benchmark("memory")
    with subprocess.Popen([sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        processes, before = memory.below(run.pid), memory.parts(run.pid)
        looked = memory.watch(run.pid, seconds=0.1)
        run.stdin.close()
    assert len(processes) == 2 and before["trainer"] == before["sampler"] == 0
    # 60 MB that both share count once, 100 MB are the child's, two interpreters come on top.
    assert 160e6 < before["others"] < 190e6
    assert looked["looks"] == 1 and looked["at_the_peak"]["others"] == pytest.approx(before["others"], rel=0.05)
    memory.show({part: 2.0 * before["others"] for part in before}, looked)
    assert "200%" in capsys.readouterr().out


def test_a_run_that_has_ended_is_no_longer_looked_at(benchmark):
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as run:
        run.stdout.read()  # ends with it; its status is asked for below
        assert benchmark("memory").watch(run.pid, seconds=20)["seconds"] < 10


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


def kept_long_world(benchmark, folder, accuracies: dict, **other):
    """Results as the benchmark keeps them, of runs with its own defaults but for ``other``."""
    folder.mkdir()
    models = shipped.record(LONG)["models"]
    world = [models[name]["digests"]["model.safetensors"] for name in ("base", "large")]
    for name, values in accuracies.items():
        table = pd.DataFrame({"acc": values, "tokens": 280.0}, index=[f"p{i}" for i in range(len(values))])
        table.attrs = {"world": world, "problems": None, "samples": 4, "steps": 40, "settings": []} | other
        table.to_parquet(folder / f"{name}.parquet")
    benchmark("long_world").main(["--report", "--kept", str(folder)])
    return (folder / "comparison.md").read_text()


def test_the_long_world_is_compared_from_what_is_finished(benchmark, tmp_path):
    """Four of five problems are gained by the method, one is lost: +60 points, paired."""
    found = {"base-seed1": [0.0, 0.0, 0.0, 0.0, 1.0], "grpo-seed1": [1.0, 1.0, 1.0, 1.0, 0.0]}
    text = kept_long_world(benchmark, tmp_path / "kept", found)
    assert "| grpo | 1 | 80.0 [" in text and "| base | 1 | 20.0 [" in text
    assert re.search(r"grpo - base \| \+(5|6)\d\.\d \[", text) and "sdpo" not in text
    assert (tmp_path / "kept" / "comparison.png").stat().st_size > 1000


def test_results_of_other_settings_are_not_compared(benchmark, tmp_path):
    found = {"base-seed1": [0.0, 1.0], "grpo-seed1": [1.0, 1.0]}
    with pytest.raises(SystemExit, match="grpo-seed1.parquet has steps 20, not 40: name another folder"):
        kept_long_world(benchmark, tmp_path / "steps", found, steps=20)
    with pytest.raises(SystemExit, match="base-seed1.parquet has world"):
        kept_long_world(benchmark, tmp_path / "world", found, world=["another", "one"])


def test_an_instructed_model_is_asked_as_crisps_teacher_is(benchmark, tmp_path):
    """The instruction stands where the student's header was; the reminder comes once."""
    question, header = "What is 1 + 1?", prompts.STUDENT_HEADER
    row = {"prompt": [{"role": "user", "content": f"{header}{question}{prompts.REMINDER}"}], "extra_info": {"index": 0}}
    pd.DataFrame([row]).to_parquet(tmp_path / "test.parquet")
    (asked,) = pd.read_parquet(benchmark("long_world").instructed(tmp_path, tmp_path))["prompt"]
    (message,) = asked
    assert message["content"].startswith(prompts.INSTRUCTIONS["v2"]) and question in message["content"]
    assert message["content"].count(prompts.REMINDER.strip()) == 1 and header not in message["content"]


def test_the_committed_comparison_is_what_the_committed_results_say(benchmark, tmp_path):
    """The table in docs/worlds.md rests on these files."""
    kept = tmp_path / "kept"
    shutil.copytree(FOLDER / "results" / "long_world", kept)
    committed = (kept / "comparison.md").read_text().splitlines()
    benchmark("long_world").main(["--report", "--kept", str(kept)])
    assert (kept / "comparison.md").read_text().splitlines()[1:] == committed[1:]  # the first has date and machine
