# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are either absent or complete, and that hold everything the next step depends on.

Layout of ``<run>/checkpoints/global_step_<N>``: ``actor/`` (verl: weights, optimiser, schedule and RNG per rank, and a
Hugging Face folder with config and tokenizer), ``teacher/`` (shards per rank, absent while the teacher is still the
initial model), ``data.pt`` (data loader), ``state.json`` (:class:`TrainerState`). The folder is written under a
temporary name and renamed; only then does ``latest_checkpointed_iteration.txt`` name it. All ranks must see the same
file system.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from opd_ext.files import put_in_place, undo_exchange, write_whole

STATE_FILE = "state.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass
class TrainerState:
    """What the trainer itself must remember: counts are optimiser steps."""

    global_step: int = 0
    teacher_version: int = 0  # the student version that the teacher was last refreshed from; 0: the initial model
    method: str = ""
    context: str = ""  # what the teacher reads, e.g. "instruction:v2"
    grader: str = ""
    attempts: int = 0  # rollouts sampled so far, where a run stops at the first success

    @classmethod
    def read(cls, folder: Path) -> "TrainerState":
        """State of a checkpoint.

        Raises:
            FileNotFoundError: the folder was not written by this trainer.
        """
        path = folder / STATE_FILE
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: {folder} is not a complete checkpoint of this trainer.")
        return cls(**json.loads(path.read_text()))

    def write(self, folder: Path) -> None:
        write_whole(folder / STATE_FILE, json.dumps(dataclasses.asdict(self), indent=2))


def mend(root: Path) -> None:
    """Put back a checkpoint that a killed run had moved away to write it anew."""
    for scratch in root.glob(".global_step_*"):
        undo_exchange(root / scratch.name[1:].partition(".")[0])


def begin(root: Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of ``step``; what a killed run left there is removed."""
    root.mkdir(parents=True, exist_ok=True)
    mend(root)
    for leftover in root.glob(".incomplete_global_step_*"):
        shutil.rmtree(leftover)
    folder = root / f".incomplete_global_step_{step}"
    folder.mkdir()
    return folder


def commit(folder: Path, root: Path, step: int, keep: int | None, best: int | None = None) -> Path:
    """Give the temporary ``folder`` its name, point the tracker at it, drop all but ``best`` and the last ``keep``."""
    final = root / f"global_step_{step}"
    put_in_place(folder, final)  # one is there if the run was resumed from an older checkpoint and came by here again
    write_whole(root / TRACKER_FILE, str(step))
    if keep:
        for old in set(steps(root)[:-keep]) - {best}:
            shutil.rmtree(root / f"global_step_{old}")
    return final


def steps(root: Path) -> list[int]:
    """The steps that have a complete checkpoint, in order."""
    return sorted(int(path.name.rsplit("_", 1)[1]) for path in root.glob("global_step_*"))
