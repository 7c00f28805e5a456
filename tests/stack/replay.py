# SPDX-License-Identifier: Apache-2.0
"""Rollouts that are dumped by one run and loaded by another: what a comparison bit for bit rests on."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch

from tests.stack.conftest import TIMEOUT_S, Train, alone, command, metrics


def replay(dump: Path, steps: int) -> list[str]:
    """verl's rollout replay: dump what is missing in ``dump``, load what is there."""
    return [
        "skip.rollout_tq.enable=true",
        f"skip.rollout_tq.dump_dir={dump}",
        f"skip.rollout_tq.steps=[{','.join(map(str, range(1, steps + 1)))}]",
        "trainer.experiment_name=replay",
        f"trainer.total_training_steps={steps}",
    ]


def in_prompt_order(dump: Path) -> None:
    """verl dumps in order of arrival and hands the groups out in the order of the file; put them in prompt order."""
    from verl.utils.tensordict_utils import index_select_tensor_dict

    for file in dump.rglob("tq_batch.pt"):
        payload = torch.load(file, weights_only=False)
        order = sorted(range(len(payload["keys"])), key=payload["keys"].__getitem__)
        payload["keys"], payload["tags"] = ([payload[name][i] for i in order] for name in ("keys", "tags"))
        payload["tensordict"] = index_select_tensor_dict(payload["tensordict"], order)
        torch.save(payload, file)


def interrupted(train: Train, run_dir: Path, settings: list[str], step: int) -> None:
    """A run as a user types it, killed with all of its processes as soon as ``step`` has been recorded.

    The kill may fall before, into or after the writing of the next step; it is taken away, so that there is work left.
    """
    process = subprocess.Popen(
        command(run_dir, *settings),
        env=alone(train.world),
        cwd=run_dir.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    checkpoints = run_dir / "checkpoints"
    shutil.rmtree(checkpoints / f"global_step_{step + 1}", ignore_errors=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
