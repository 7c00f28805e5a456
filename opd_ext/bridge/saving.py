# SPDX-License-Identifier: Apache-2.0
"""What the trainer saves and goes on from, beside what verl does: the teacher, its own state, and what it checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transfer_queue as tq

from opd_ext.alarms import record
from opd_ext.bridge import checkpoint
from opd_ext.checkpoints import best
from opd_ext.checkpoints.layout import MODEL, TrainerState, shard_files, shards_per_replica, teacher_folder

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
    folder, teachers = checkpoint.begin(root, step), _held_teachers(trainer)
    with checkpoint.writing(folder, root, step):
        workers.save_checkpoint(str(folder / "actor"), None, step)
        for name in teachers:
            workers.save_teacher(str(folder / teacher_folder(name)), name)
        torch.save(trainer.train_dataloader.state_dict(), folder / "data.pt")
        if trainer.trainer_mode != "sync":  # rollouts that no later policy could sample again
            tq.save_checkpoint(folder / "transfer_queue", metadata={"global_steps": step})
        state.global_step = step
        state.rollbacks = max(state.rollbacks, record.rollbacks(trainer.run_dir))
        state.write(folder)
        actor = trainer.config.actor_rollout_ref.actor
        writers = shards_per_replica(workers.world_size, actor.fsdp_config.fsdp_size)
        checkpoint.check_complete(folder, workers.world_size, writers, actor.checkpoint.save_contents, teachers)
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
    for name in _held_teachers(trainer):
        workers.load_teacher(str(folder / teacher_folder(name)), name)
    told = f"resumed from {folder}: step {step}"
    for name in trainer.opd.teacher_weights or [""]:
        version, whose = trainer.state.version(name), f" {name}" if name else ""
        told += f", teacher{whose} version {version} (age {step - version} steps)"
    saved, _ = shard_files(folder / "actor", MODEL)
    if saved != workers.world_size:
        told += f"; {saved} trainer ranks saved it, {workers.world_size} go on"
    if (since := record.rollbacks(trainer.run_dir) - trainer.state.rollbacks) > 0:
        factor = trainer.opd.alarms.rollback_lr**since
        workers.scale_lr(factor)
        told += f"; learning rate x {factor:g}, because an alarm brought the run back here"
    trainer.log.note(told)


def _root(trainer: OPDTrainer) -> Path:
    return Path(trainer.config.trainer.default_local_dir).absolute()


def _held_teachers(trainer: OPDTrainer) -> list[str]:
    """The teachers' weights that a checkpoint of this step holds: those that a later step reads and nobody else has.

    Initial weights are where the run got them. Of an adapter they are nowhere, since its A begins at random.
    """
    if trainer.opd.schedule(trainer.global_steps + 1)[0] == 0:
        return []
    moving = {name for name, view in trainer.adapters.items() if view.opd.teacher.kind.moves}
    return [name for name in trainer.opd.teacher_weights if name in moving or trainer.state.version(name) > 0]
