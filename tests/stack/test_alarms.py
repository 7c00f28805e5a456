# SPDX-License-Identifier: Apache-2.0
"""A run that breaks on purpose is brought back to its best checkpoint and ends well, or is stopped; a healthy one is
left alone."""

import json

import pytest

from opd_ext.alarms.record import read
from opd_ext.report.metrics import undescribed
from opd_ext.report.runs import look
from opd_ext.run_state import FINISHED
from tests.stack.conftest import metrics

pytestmark = pytest.mark.slow

HEALTHY, TOTAL = 10, 16
RATE = 3e-2  # a hundred times what this model bears
SETTINGS = ["trainer.save_freq=5", "trainer.test_freq=5", "trainer.val_before_train=true"]
ALARMS = "opd.alarms={entropy: rollback, length: rollback, accuracy: rollback, divergence: rollback, window: 8, "
ALARMS += "persist: 2, max_rollbacks: 1, rollback_lr: 0.001}"
BREAKS = [
    *SETTINGS,
    f"trainer.total_training_steps={TOTAL}",
    f"actor_rollout_ref.actor.optim.lr={RATE}",
    "actor_rollout_ref.actor.checkpoint.load_contents=[model]",  # else the rate would be the checkpoint's
]


def problems(run_dir, step):
    lines = (run_dir / "generations" / f"train_{step}.jsonl").read_text().splitlines()
    return {json.loads(line)["index"] for line in lines}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """Ten steps that change next to nothing, then some that break the model, and what the run makes of it."""
    folder = tmp_path_factory.mktemp("alarms") / "run"
    train(folder, *SETTINGS, f"trainer.total_training_steps={HEALTHY}", "actor_rollout_ref.actor.optim.lr=1e-6")
    healthy = read(folder)
    output = train(folder, *BREAKS, ALARMS)
    return folder, healthy, output


def test_a_healthy_run_raises_no_alarm(run):
    assert run[1] == []


def test_a_run_that_breaks_goes_back_once_says_why_and_ends_well(run):
    folder, _, output = run
    back = [record for record in read(folder) if record.done == "rollback"]
    assert len(back) == 1 and back[0].to in (5, HEALTHY) and HEALTHY < back[0].step < TOTAL and not back[0].pending
    told = " ".join(output.split())
    assert f"ALARM at {back[0]}" in told and "learning rate x 0.001, because an alarm brought the run back" in told
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))  # the broken steps are gone
    assert lines[-1]["opd/lr"] == pytest.approx(RATE / 1000)
    assert not any(name.startswith("alarm/") for line in lines for name in line)
    assert metrics(folder, "val")[-1]["val/accuracy"] > 0.4
    listed = look(folder)
    assert (listed.state, listed.alarms, listed.step) == (FINISHED, len(read(folder)), TOTAL)


def test_it_goes_on_with_the_problems_that_a_resumed_run_has(run):
    """The data loader's place comes from the checkpoint: no problem of an epoch is seen twice."""
    seen = [problems(run[0], step) for step in range(1, TOTAL + 1)]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_what_can_go_back_no_more_stops_and_is_validated(train, run, tmp_path):
    """The rate after the way back is as bad as before."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "alarms.jsonl").unlink()
    for step in range(HEALTHY + 1, TOTAL + 1):
        shutil.rmtree(folder / "checkpoints" / f"global_step_{step}", ignore_errors=True)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(HEALTHY))
    train(folder, *BREAKS, ALARMS.replace("max_rollbacks: 1", "max_rollbacks: 0"))
    stopped = [record for record in read(folder) if record.done == "stop"]
    (step,) = {record.step for record in stopped}  # a step may show several signs at once
    last = metrics(folder)[-1]
    assert last["step"] == step < TOTAL and all(last[f"alarm/{record.alarm}"] == 1.0 for record in stopped)
    assert metrics(folder, "val")[-1]["step"] == step
    assert not undescribed(last)
