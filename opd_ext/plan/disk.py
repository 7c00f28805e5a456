# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint, and of all that are on disk at a time. Of replicas (HSDP) the first alone writes."""

from opd_ext.plan.run import Run

STEP_COUNTER = 4  # bytes that AdamW keeps per tensor: how many steps it has made


def checkpoint_bytes(run: Run) -> dict[str, float]:
    """Tensors in the files of one checkpoint, over all ranks that write.

    Beside them a file has its pickled names: some kilobytes per rank.
    """
    master = run.sharding.master
    weights = (run.student.parameters + run.adapter) * master
    moments = 2 * run.trained * master + STEP_COUNTER * run.trained_tensors * run.sharding.shards
    files = {"model": weights, "optimizer": moments}
    if run.moving or run.teacher_adapters:
        models = sum(shape.parameters for shape in run.moving) * run.teacher_sharding.master
        files["teacher"] = models + run.held_adapters
    return files


def on_disk(run: Run) -> tuple[float, int]:
    """Bytes at most, and how many checkpoints these are: those that are kept and one that is being written.

    The one of the best validation stays besides, if it is none of the last.
    """
    kept = min(run.kept or run.saves, run.saves)
    looks = run.validations + sum(count for count, _ in run.meanwhile)
    best = 1 if looks > 1 and kept < run.saves else 0
    count = min(run.saves, kept + best + 1)
    return count * sum(checkpoint_bytes(run).values()), count
