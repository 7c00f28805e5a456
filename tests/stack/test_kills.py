# SPDX-License-Identifier: Apache-2.0
"""Twenty-two kills at random moments, and every run ends as it would have without them, bit for bit.

A run is killed with all of its processes, started again, killed again, and at last left alone. The moments are drawn
from a generator: a step, and how far into the next one; or, where that step is behind it, how long after the start.
"""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from opd_ext.tinymath.build import build
from opd_ext.tinymath.levels import TOOLS
from tests.stack.conftest import TIMEOUT_S, alone, command, metrics, shards

pytestmark = pytest.mark.slow

STEPS = 5
UP_S = 25.0  # that a run takes to its first step, on two quiet cores
GROUPS = ["actor_rollout_ref.rollout.n=4", "data.train_batch_size=4"]
RUNS = {  # settings, kills
    "crisp": (["method=crisp", "opd.teacher.interval=2"], 4),
    "sdpo": (["method=sdpo", *GROUPS], 4),
    "trace": (["method=trace", "opd.teacher.interval=2", *GROUPS], 3),
    "iw_opd": (["method=iw_opd", "opd.max_teacher_entropy=null"], 3),
    "one_step_off": (["method=crisp", "opd.teacher.interval=2", "asynchronous=one_step_off"], 3),
    "separate": (["method=crisp", "opd.teacher.interval=2", "asynchronous=separate_cpu"], 2),
    "agents": (["method=crisp", "opd.teacher.interval=2", "scale=cpu_tiny_tools", "data.max_response_length=256"], 3),
}
assert sum(kills for _, kills in RUNS.values()) == 22


def lines(run_dir):
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


def rollouts(run_dir):
    """Of the last step; how long an annotator took is no part of them."""
    lines = (run_dir / "generations" / f"train_{STEPS}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        (row.get("annotation") or {}).pop("latency_s", None)
    return rows


def killed(world, run_dir, settings, step, seconds):
    """Start or go on, and kill everything so many seconds after ``step`` has been recorded."""
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    process = subprocess.Popen(
        command(run_dir, *settings),
        env=alone(world),
        cwd=run_dir.parent,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while step and len(lines(run_dir)) < step:
            assert process.poll() is None and time.monotonic() < deadline, f"step {step} was not reached"
            time.sleep(0.05)
        time.sleep(seconds)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(train, tmp_path, name):
    (settings, kills), draw = RUNS[name], random.Random(name)
    settings = [*settings, f"trainer.total_training_steps={STEPS}", "trainer.experiment_name=kills"]
    if name == "agents":
        build(train.world / TOOLS.name, progress=False, level=TOOLS)
    calm, shot = tmp_path / "calm", tmp_path / "shot"
    train.alone(calm, *settings)
    took = {line["step"]: line["time"] for line in metrics(calm)}
    step = (took[STEPS] - took[1]) / (STEPS - 1)
    for after in sorted(draw.choices(range(STEPS - 1), k=kills)):
        seconds = draw.random() * (step if after > len(lines(shot)) else UP_S)
        killed(train.world, shot, settings, after, seconds)
        print(f"{name}: killed {seconds:.1f} s after step {after}; recorded are {len(lines(shot))}")
    train.alone(shot, *settings)
    for part in ("actor", "teacher"):
        if not (calm / f"checkpoints/global_step_{STEPS}" / part).is_dir():
            continue  # of another model, which is where it was
        for ours, theirs in zip(shards(shot, STEPS, part), shards(calm, STEPS, part), strict=True):
            assert ours.keys() == theirs.keys()
            assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert [line["step"] for line in metrics(shot)] == list(range(1, STEPS + 1))
    for key in ("opd/loss", "opd/grad_norm", "rollout/tokens_mean", "rollout/accuracy"):
        assert [line[key] for line in metrics(shot)] == [line[key] for line in metrics(calm)], key
    assert rollouts(shot) == rollouts(calm)
    assert not list((shot / "checkpoints").glob(".incomplete*"))
