# SPDX-License-Identifier: Apache-2.0
"""A grader that raises for some rows: the run ends as documented, or their rollouts score 0; copies are draws."""

import json
import subprocess

import pandas as pd
import pytest

from tests.stack.conftest import TIMEOUT_S, command, metrics

GRADER = """
from opd_ext.tinymath.grader import compute_score as grade

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    if extra_info["index"] % 4 == 1:
        raise KeyError("unit_tests")
    return grade(data_source, solution_str, ground_truth, extra_info, **kwargs)
"""


@pytest.mark.slow
def test_a_grader_that_raises_for_some_rows_ends_the_run_or_scores_zero_and_no_row_is_missing(train, tmp_path):
    (tmp_path / "grader.py").write_text(GRADER)
    settings = [
        f"reward.custom_reward_function.path={tmp_path}/grader.py",
        "trainer.total_training_steps=1",
        "trainer.save_freq=-1",
        "data.val_max_samples=32",
        "trainer.val_before_train=true",
    ]
    stopped = subprocess.run(
        command(tmp_path / "stop", *settings, python=train.stack.python),
        env=train.environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert stopped.returncode == 1
    assert "KeyError: 'unit_tests'" in stopped.stdout.splitlines()[-1], stopped.stdout[-3000:]
    assert "opd.rollout.failed=zero" in stopped.stdout.splitlines()[-1]

    console = train(tmp_path / "zero", *settings, "opd.rollout.failed=zero")
    (line,) = metrics(tmp_path / "zero", "val")
    rows = [json.loads(row) for row in (tmp_path / "zero/generations/val_0.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["index"] % 4 == 1]
    assert line["val/samples"] == len(rows) == 32 and line["val/failed"] == len(failed) / 32 > 0
    assert all(row["failed"] == "KeyError: 'unit_tests'" and row["acc"] == 0 for row in failed)
    assert metrics(tmp_path / "zero")[0]["rollout/samples"] == 8
    assert "KeyError: 'unit_tests' (data_source" in console and "lost: failed" in console


@pytest.mark.slow
def test_eight_copies_of_a_row_sampled_once_are_one_row_sampled_eight_times(train, tmp_path):
    """The public AIME file holds every problem 32 times, and mean@32 over it was one sample."""
    problem = pd.read_parquet(train.world / "tinymath" / "val.parquet").iloc[:1]
    found = {}
    for name, copies, n in (("copies", 8, 1), ("samples", 1, 8)):
        pd.concat([problem] * copies).to_parquet(tmp_path / f"{name}.parquet")
        rollout = "actor_rollout_ref.rollout"
        train(
            tmp_path / name,
            f"data.train_files={tmp_path}/{name}.parquet",
            f"data.val_files={tmp_path}/{name}.parquet",
            f"data.train_batch_size={copies}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={copies}",
            f"{rollout}.n={n}",
            f"{rollout}.val_kwargs.n={n}",
            f"{rollout}.val_kwargs.temperature=1.0",
            f"{rollout}.val_kwargs.do_sample=true",
            "trainer.total_training_steps=1",
            "trainer.save_freq=-1",
            "trainer.val_before_train=true",
        )
        for phase in ("train_1", "val_0"):
            lines = (tmp_path / name / "generations" / f"{phase}.jsonl").read_text().splitlines()
            found[name, phase] = sorted(json.loads(line)["output"] for line in lines)
    for phase in ("train_1", "val_0"):
        assert found["copies", phase] == found["samples", phase]
        assert len(set(found["copies", phase])) > 2
