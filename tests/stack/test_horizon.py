# SPDX-License-Identifier: Apache-2.0
"""Rollouts that stop at the horizon train what whole ones train as far as it: the same tokens, the same update."""

import gzip
import json

import pytest

from tests.stack.conftest import alone, command, finish

SETTINGS = [
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
]


def tokens(run, step):
    with gzip.open(run / f"generations/tokens_{step}.jsonl.gz", "rt") as file:
        return {(row["uid"], row["sample"]): row for row in map(json.loads, file)}


@pytest.mark.slow
def test_what_is_not_sampled_would_not_have_trained(world, tmp_path):
    found = {}
    for stop in ("true", "false"):
        run = tmp_path / stop
        horizon = f"opd.horizon={{start:0.1,end:0.3,steps:1,stop:{stop}}}"
        finish(command(run, *SETTINGS, horizon), alone(world), tmp_path)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[stop] = [line for line in lines if line["phase"] == "train"]
    for step, (stopped, whole) in enumerate(zip(found["true"], found["false"], strict=True), start=1):
        assert stopped["rollout/horizon"] == whole["rollout/horizon"] == {1: 7, 2: 20}[step]  # of 64
        assert stopped["rollout/tokens_max"] <= stopped["rollout/horizon"] < whole["rollout/tokens_max"]
        assert stopped["rollout/stopped"] > 0.5 and whole["rollout/stopped"] == 0
        assert "rollout/accuracy" in whole and "rollout/accuracy" not in stopped
        # Longer sequences are packed otherwise: sums in another order, in float32.
        for name in ("opd/loss", "opd/divergence", "opd/grad_norm", "opd/response_tokens"):
            assert stopped[name] == pytest.approx(whole[name], rel=1e-4), name
        rows, others = tokens(tmp_path / "true", step), tokens(tmp_path / "false", step)
        for key, row in rows.items():
            assert others[key]["responses"][: len(row["responses"])] == row["responses"]
