# SPDX-License-Identifier: Apache-2.0
"""What lies where in ``<run>/checkpoints``, and whether it is complete.

``global_step_<N>/actor/`` is verl's: ``model_``, ``optim_`` and ``extra_state_world_size_<W>_rank_<R>.pt`` of every
rank, ``fsdp_config.json`` and ``huggingface/`` (config and tokenizer). Of replicas (HSDP: the same weights on several
groups of ranks) only the first writes weights and moments. ``teacher/`` holds ``world_size_<W>_rank_<R>.pt``; of
several teachers each set of weights that has moved is in ``teachers/<name>/``. Beside a LoRA student a teacher that
moves is an adapter, by the names of the student's, and is there from the first checkpoint on.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from opd_ext.files import write_whole

STATE_FILE = "state.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"

MODEL, OPTIMISER, EXTRA, TEACHER = "model_", "optim_", "extra_state_", ""
"""How the names of shard files begin."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as asked; one sentence."""


@dataclasses.dataclass
class TrainerState:
    """What the trainer itself must remember: counts are optimiser steps."""

    global_step: int = 0
    teacher_version: int = 0  # the student version that the teacher was last refreshed from; 0: the initial model
    teacher_versions: dict[str, int] = dataclasses.field(default_factory=dict)  # of several: by the name of the weights
    teacher_weights: dict[str, str] = dataclasses.field(default_factory=dict)  # teacher -> name of the weights it has
    method: str = ""
    context: str = ""  # what the teacher reads, e.g. "instruction:v2"
    grader: str = ""
    rollbacks: int = 0  # of the run when it was saved: its learning rate is that of as many
    trainer_mode: str = "opd"  # trainer.v1.trainer_mode: whether the next batch is in the queue already
    attempts: int = 0  # rollouts sampled so far, where a run stops at the first success

    def version(self, weights: str) -> int:
        """The student version that weights were last refreshed from; their name is empty if they are the only ones."""
        return self.teacher_versions.get(weights, 0) if weights else self.teacher_version

    def refreshed(self, weights: str, step: int) -> None:
        """A set of weights is now that of ``step``."""
        if weights:
            self.teacher_versions[weights] = step
        else:
            self.teacher_version = step

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


def steps(root: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.name.rsplit("_", 1)[1]) for path in root.glob("global_step_*"))


def export_command(run_dir: Path) -> str | None:
    """What makes a Hugging Face folder of the run's newest checkpoint; None without one."""
    return f"opd export {shlex.quote(str(run_dir))}" if steps(run_dir / "checkpoints") else None


def latest(root: Path) -> int | None:
    """The step that a run would go on from: the one that the tracker names."""
    tracker = root / TRACKER_FILE
    return int(tracker.read_text()) if tracker.is_file() else None


def shard_name(kind: str, world_size: int, rank: int) -> str:
    return f"{kind}world_size_{world_size}_rank_{rank}.pt"


def shard_files(folder: Path, kind: str) -> tuple[int, dict[int, Path]]:
    """The number of ranks that wrote, and rank -> file, in the order of ranks.

    Raises:
        CheckpointError: none, or files of several world sizes.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("*.pt"):
        if name := re.fullmatch(rf"{kind}world_size_(\d+)_rank_(\d+)\.pt", path.name):
            found.setdefault(int(name[1]), {})[int(name[2])] = path
    if len(found) != 1:
        what = f"shards of {' and '.join(map(str, sorted(found)))} ranks side by side" if found else "no shards"
        raise CheckpointError(f"{folder} holds {what}: choose another checkpoint.")
    ((world_size, files),) = found.items()
    return world_size, dict(sorted(files.items()))


def shards_per_replica(world_size: int, fsdp_size: int) -> int:
    """Ranks over which weights are spread; ``fsdp_size`` as verl has it: -1 is all of them."""
    return fsdp_size if 0 < fsdp_size < world_size else world_size


def teacher_folder(weights: str) -> Path:
    """Where a checkpoint holds a set of a teacher's weights; the name is empty if it is the only one."""
    return Path("teachers", weights) if weights else Path("teacher")


def missing_files(
    folder: Path, world_size: int, writers: int, contents: list[str], teachers: Collection[str]
) -> list[str]:
    """What a checkpoint in ``folder`` lacks: shards of weights, moments and RNG, and of teachers.

    Args:
        writers: ranks that write weights and moments, the first of all.
        contents: verl's ``checkpoint.save_contents``.
        teachers: names of the teachers' weights that it is to hold.
    """
    counts = {MODEL: ("model", writers), OPTIMISER: ("optimizer", writers), EXTRA: ("extra", world_size)}
    wanted = [
        Path("actor") / shard_name(kind, world_size, rank)
        for kind, (content, count) in counts.items()
        if content in contents
        for rank in range(count)
    ]
    for name in teachers:
        wanted += [teacher_folder(name) / shard_name(TEACHER, world_size, rank) for rank in range(writers)]
    return [str(name) for name in wanted if not (folder / name).is_file()]
