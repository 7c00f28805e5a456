# SPDX-License-Identifier: Apache-2.0
"""A recipe submitted to a running Ray cluster: the job trains, its log is followed, its exit code comes back."""

import subprocess
from pathlib import Path

import pytest

from tests.stack.conftest import ROOT, SMALL, TIMEOUT_S, environment, metrics

SUBMIT = ROOT / "recipes" / "ray" / "submit.sh"


def submit(stack, world: Path, runs: Path, recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [SUBMIT, recipe, "--address", stack.dashboard, "--", *overrides],
        env={**environment(world), **stack.environment, "OPD_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow  # the job has its own copy of this package, so its processes start cold
def test_a_submitted_recipe_trains_and_reports(stack, world, tmp_path):
    overrides = [*SMALL, "trainer.total_training_steps=1", "trainer.experiment_name=job", "trainer.save_freq=-1"]
    done = submit(stack, world, tmp_path, ROOT / "recipes" / "crisp" / "tiny_cpu.sh", *overrides)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1/1" in done.stdout  # the followed log holds the row of the step
    assert len(metrics(tmp_path / "job")) == 1


def test_a_refused_configuration_comes_back_as_a_failed_job(stack, world, tmp_path):
    done = submit(stack, world, tmp_path, ROOT / "recipes" / "crisp" / "tiny_cpu.sh", "opd.teacher.weights=stale")
    assert done.returncode == 2, done.stdout[-4000:]
    assert "choose one of: base, ema, external, frozen, live, periodic" in done.stdout


def test_a_recipe_that_does_not_exist_is_refused_before_anything_is_submitted(stack, world, tmp_path):
    done = submit(stack, world, tmp_path, ROOT / "recipes" / "nothing.sh")
    assert done.returncode == 2 and "nothing.sh" in done.stdout
