# SPDX-License-Identifier: Apache-2.0
"""What the trainer saves and goes on from, beside what verl does: the teacher, its own state, and what it checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_ext.bridge import checkpoint
from opd_ext.checkpoints import best
from opd_ext.checkpoints.layout import MODEL, TrainerState, shard_files, shards_per_replica

if TYPE_CHECKING:
    from opd_ext.bridge.trainer import OPDTrainer


def prepare(trainer: OPDTrainer) -> None:
    """Before anything is loaded: all ranks write where the trainer reads, and what a killed save moved is back.

    Raises:
        CheckpointError: a rank writes elsewhere.
    """
    root = _root(trainer)
    if trainer.config.trainer.save_freq > 0:
        checkpoint.check_shared(root, trainer.actor_rollout_wg.leave_token)
    checkpoint.mend(root)


def save(trainer: OPDTrainer) -> Path:
    """A checkpoint of this step, complete and under its name.

    Raises:
        CheckpointError: a rank's files did not arrive.
    """
    root, step, workers, state = _root(trainer), trainer.global_steps, trainer.actor_rollout_wg, trainer.state
    folder = checkpoint.begin(root, step)
    workers.save_checkpoint(str(folder / "actor"), None, step)
    teacher = _holds_teacher(trainer)
    if teacher:
        workers.save_teacher(str(folder / "teacher"))
    torch.save(trainer.train_dataloader.state_dict(), folder / "data.pt")
    state.global_step = step
    state.write(folder)
    actor = trainer.config.actor_rollout_ref.actor
    writers = shards_per_replica(workers.world_size, actor.fsdp_config.fsdp_size)
    checkpoint.check_complete(folder, workers.world_size, writers, actor.checkpoint.save_contents, teacher)
    saved = set(checkpoint.steps(root))
    kept = best.best_step({at: share for at, share in best.validations(trainer.run_dir).items() if at in saved})
    return checkpoint.commit(folder, root, step, trainer.config.trainer.max_actor_ckpt_to_keep, kept)


def load(trainer: OPDTrainer) -> None:
    """Teacher and state of the checkpoint that verl has found and loaded.

    Raises:
        CheckpointError, FileNotFoundError: it is incomplete.
    """
    step, workers, settings = trainer.global_steps, trainer.actor_rollout_wg, trainer.config.trainer
    explicit = settings.resume_mode == "resume_path"
    folder = Path(settings.resume_from_path).absolute() if explicit else _root(trainer) / f"global_step_{step}"
    trainer.state = TrainerState.read(folder)
    if _holds_teacher(trainer):
        workers.load_teacher(str(folder / "teacher"))
    version = trainer.state.teacher_version
    told = f"resumed from {folder}: step {step}, teacher version {version} (age {step - version} steps)"
    saved, _ = shard_files(folder / "actor", MODEL)
    if saved != workers.world_size:
        told += f"; {saved} trainer ranks saved it, {workers.world_size} go on"
    trainer.log.note(told)


def _root(trainer: OPDTrainer) -> Path:
    return Path(trainer.config.trainer.default_local_dir).absolute()


def _holds_teacher(trainer: OPDTrainer) -> bool:
    """Whether a checkpoint of this step holds a teacher: not the initial weights, and a later step reads it."""
    moved = trainer.opd.needs_teacher_engine and trainer.state.teacher_version > 0
    return moved and trainer.opd.schedule(trainer.global_steps + 1)[0] > 0
