# SPDX-License-Identifier: Apache-2.0
"""A real run reads the keys that :mod:`tests.unit.test_reads` rests on, and none that is refused as unread.

After an upgrade of verl, what the failure lists is what has changed: put it into ``tests/unit/read_keys.txt`` or take
it away there, and see what ``opd_ext/config/unread.py`` says of it.
"""

import os
from pathlib import Path

import pytest

from opd_ext.config import unread
from tests.stack.conftest import ROOT, alone, command, finish

KEYS = ROOT / "tests" / "unit" / "read_keys.txt"
SETTINGS = [
    "method=trace",
    "algorithm.rollout_correction.rollout_is=token",
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",  # two updates a batch: the old policy gets a pass of its own
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "trainer.save_freq=2",
]


@pytest.mark.slow
def test_a_run_reads_what_is_recorded_and_nothing_that_is_refused(world, tmp_path):
    file = tmp_path / "keys.txt"
    hook = Path(__file__).parent / "reads"  # its sitecustomize.py is imported by every process of the run
    path = os.pathsep.join(filter(None, (str(hook), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = alone(world) | {"PYTHONPATH": path, "OPD_READ_KEYS": str(file)}
    finish(command(tmp_path / "run", *SETTINGS), environment, tmp_path)
    read = set(file.read_text().split())
    assert sorted(set(KEYS.read_text().split()) - read) == []
    asked = {"trainer.critic_warmup"}  # waits for a critic, which is not there
    assert sorted({*unread.NEVER, *unread.WITH_TEACHER} & read - asked) == []
