# SPDX-License-Identifier: Apache-2.0
"""Going back to an earlier checkpoint: what a run's alarm has asked for, done between two starts of its trainer."""

import dataclasses
import shutil
from pathlib import Path

from opd_ext.alarms import record as alarms
from opd_ext.checkpoints.layout import TRACKER_FILE, CheckpointError, steps
from opd_ext.files import write_jsonl, write_whole


def settle(run_dir: Path, root: Path) -> int | None:
    """Put the checkpoint in charge that a rollback names, and take the later ones away.

    Each part can be done again, so a run that is killed meanwhile finishes it at its next start.

    Args:
        run_dir: whose ``alarms.jsonl`` says whether there is a rollback to be done.
        root: of the checkpoints.

    Returns:
        The step that the run goes on from; None where nothing was asked for.

    Raises:
        CheckpointError: that checkpoint is gone.
    """
    records = alarms.read(run_dir)
    asked = [record for record in records if record.pending]
    if not asked:
        return None
    target = asked[-1].to
    if target is None or target not in steps(root):
        raise CheckpointError(f"{run_dir} was to go back to step {target}, whose checkpoint is gone from {root}.")
    write_whole(root / TRACKER_FILE, str(target))
    for later in (step for step in steps(root) if step > target):
        shutil.rmtree(root / f"global_step_{later}")
    done = (dataclasses.asdict(dataclasses.replace(record, pending=False)) for record in records)
    write_jsonl(Path(run_dir) / alarms.FILE, done)
    return target
