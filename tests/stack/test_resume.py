# SPDX-License-Identifier: Apache-2.0
"""A killed run goes on where it stopped: on the same rollouts it ends with the same bits as an undisturbed one."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.stack.conftest import TIMEOUT_S, alone, command, metrics, shards
from tests.stack.replay import in_prompt_order, replay

STEPS = 4


def kill_after_step(step: int, run_dir: Path, process: subprocess.Popen) -> None:
    """SIGKILL the whole run as soon as ``step`` has been recorded."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    base = tmp_path_factory.mktemp("resume")
    undisturbed, killed, dump = base / "undisturbed", base / "killed", base / "dump"
    settings = [*replay(dump, STEPS), "opd.teacher.interval=2"]
    train(undisturbed, *settings)
    in_prompt_order(dump)
    process = subprocess.Popen(
        command(killed, *settings),
        env=alone(train.world),
        cwd=base,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    kill_after_step(2, killed, process)
    # The kill may fall before, into or after the writing of step 3; take step 3 away so that the resumed run has work.
    shutil.rmtree(killed / "checkpoints" / "global_step_3", ignore_errors=True)
    (killed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    (killed / "checkpoints" / ".incomplete_global_step_3").mkdir(exist_ok=True)  # as a kill inside a save leaves it
    output = train(killed, *settings)
    return undisturbed, killed, output


def test_a_resumed_run_says_what_it_resumed(runs):
    assert "global_step_2" in runs[2] and "teacher version 2 (age 0 steps)" in " ".join(runs[2].split())


@pytest.mark.parametrize("part", ["actor", "teacher"])
def test_a_resumed_run_ends_with_the_same_bits(runs, part):
    undisturbed, killed, _ = runs
    for ours, theirs in zip(shards(killed, STEPS, part), shards(undisturbed, STEPS, part), strict=True):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, different


def test_a_resumed_run_repeats_the_metrics(runs):
    undisturbed, killed, _ = runs
    names = ("opd/loss", "opd/grad_norm", "teacher/version", "rollout/tokens_mean")
    by_step = {line["step"]: line for line in metrics(undisturbed)}
    for line in metrics(killed):
        assert [line[name] for name in names] == [by_step[line["step"]][name] for name in names]
    assert [line["step"] for line in metrics(killed)][-2:] == [3, 4]


def test_an_interrupted_save_leaves_no_trace(runs):
    assert not list((runs[1] / "checkpoints").glob(".incomplete*"))
