# SPDX-License-Identifier: Apache-2.0
"""What was raised stays on record across resumes, and a rollback is done wholly or again."""

import pytest

from opd_ext.alarms.record import Record, append, forget_after, read, rollbacks
from opd_ext.alarms.rollback import settle
from opd_ext.checkpoints.layout import CheckpointError, latest, steps

WARNED = Record(8, "length", "longer", "warn")
BACK = Record(12, "entropy", "gone", "rollback", to=5, pending=True)


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (5, 10, 12):
        (root / f"global_step_{step}" / "actor").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("12")
    append(tmp_path, [WARNED])
    append(tmp_path, [BACK])
    return tmp_path, root


def test_records_are_read_as_they_were_written(run):
    assert read(run[0]) == [WARNED, BACK] and rollbacks(run[0]) == 1
    assert str(BACK) == "step 12: gone (entropy); back to the checkpoint of step 5"
    assert read(run[1]) == []


def test_the_way_back_puts_the_checkpoint_in_charge_and_is_gone_once(run):
    folder, root = run
    assert settle(folder, root) == 5
    assert latest(root) == 5 and steps(root) == [5]
    assert settle(folder, root) is None and rollbacks(folder) == 1


def test_a_way_back_that_was_interrupted_is_done_again(run):
    folder, root = run
    (root / "latest_checkpointed_iteration.txt").write_text("5")
    (root / "global_step_12" / "actor").rmdir()
    (root / "global_step_12").rmdir()  # killed here
    assert settle(folder, root) == 5 and steps(root) == [5]


def test_a_checkpoint_that_is_gone_is_said(run):
    folder, root = run
    (root / "global_step_5" / "actor").rmdir()
    (root / "global_step_5").rmdir()
    with pytest.raises(CheckpointError, match="step 5, whose checkpoint is gone"):
        settle(folder, root)


def test_a_resumed_run_forgets_what_it_will_find_again_but_not_that_it_went_back(run):
    forget_after(run[0], 5)
    assert read(run[0]) == [BACK]
    forget_after(run[0], 0)  # begins anew
    assert read(run[0]) == []
