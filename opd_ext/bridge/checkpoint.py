# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are either absent or complete, and that hold everything the next step depends on.

What lies in ``<run>/checkpoints/global_step_<N>`` is said in :mod:`opd_ext.checkpoints.layout`, beside it
``data.pt`` (data loader) and ``state.json`` (:class:`TrainerState`). The folder is written under a temporary name and
renamed; only then does ``latest_checkpointed_iteration.txt`` name it. All ranks must see the same file system:
:func:`check_shared` asks them at the start, :func:`check_complete` counts what they wrote before the rename.
"""

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from opd_ext.checkpoints import reshard
from opd_ext.checkpoints.layout import (
    MODEL,
    TRACKER_FILE,
    CheckpointError,
    TrainerState,
    missing_files,
    steps,
)
from opd_ext.checkpoints.shards import Shards
from opd_ext.files import put_in_place, undo_exchange, write_whole

__all__ = [
    "TrainerState",
    "begin",
    "check_complete",
    "check_shared",
    "commit",
    "leave_token",
    "load_resharded",
    "mend",
    "steps",
    "writing",
]

PATIENCE_S = 10.0
"""How long a network file system may take to show what another node has written."""


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


@contextmanager
def writing(folder: Path, root: Path, step: int) -> Iterator[None]:
    """While a checkpoint is written to the temporary ``folder``: a full disk is called one.

    What torch raises there names neither the disk nor the reason. The unfinished checkpoint goes, since it is what
    fills the disk; the one before stays in charge.

    Raises:
        CheckpointError: one sentence.
    """
    try:
        yield
    except Exception as error:
        if not is_full(root):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        before = max(steps(root), default=0)
        kept = f"the checkpoint of step {before}" if before else "the beginning, since none is there yet"
        raise CheckpointError(
            f"The disk of {root} is full, so that the checkpoint of step {step} could not be written: free space "
            f"there, or set trainer.max_actor_ckpt_to_keep, and start the run again; it goes on from {kept}."
        ) from error


def is_full(folder: Path, wanted: int = 1 << 20) -> bool:
    """Whether so many bytes cannot be written there, for want of space or of a quota."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(0, wanted, 1 << 16):
                if file.write(b"\0" * (1 << 16)) < 1 << 16:
                    return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def commit(folder: Path, root: Path, step: int, keep: int | None, best: int | None = None) -> Path:
    """Give the temporary ``folder`` its name, point the tracker at it, drop all but ``best`` and the last ``keep``."""
    final = root / f"global_step_{step}"
    put_in_place(folder, final)  # one is there if the run was resumed from an older checkpoint and came by here again
    write_whole(root / TRACKER_FILE, str(step))
    if keep:
        for old in set(steps(root)[:-keep]) - {best}:
            shutil.rmtree(root / f"global_step_{old}")
    return final


def leave_token(folder: str, rank: int) -> bool:
    """Of rank ``rank``: write a file into a folder that the trainer has made; False if there is no such folder here."""
    if not _within(PATIENCE_S, Path(folder).is_dir):
        return False
    write_whole(Path(folder) / f"rank_{rank}", str(rank))
    return True


def check_shared(root: Path, ask: Callable[[str], list[str]]) -> None:
    """Every rank writes where the trainer reads; asked before the first step, since a save would find out too late.

    Args:
        root: of the checkpoints.
        ask: gives every rank the name of a folder, in which rank ``i`` writes ``rank_<i>`` (:func:`leave_token`);
            returns the names of their nodes in the order of ranks.

    Raises:
        CheckpointError: one sentence that names the nodes.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".shared_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = root / f".shared_{uuid4().hex[:12]}"
    folder.mkdir()
    try:
        nodes = ask(str(folder))
        ranks = range(len(nodes))
        _within(PATIENCE_S, lambda: all((folder / f"rank_{rank}").exists() for rank in ranks))
        apart = [rank for rank in ranks if not (folder / f"rank_{rank}").exists()]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if apart:
        names = ", ".join(sorted({nodes[rank] for rank in apart}))
        raise CheckpointError(
            f"{root} is not the same folder on every node: what {len(apart)} of {len(nodes)} ranks write there (on "
            f"{names}) does not arrive here; set opd.run_dir or OPD_RUNS to a file system that all nodes share."
        )


def check_complete(folder: Path, world_size: int, writers: int, contents: list[str], teachers: Collection[str]) -> None:
    """Before a checkpoint gets its name: what every rank must have written is there.

    Args: see :func:`opd_ext.checkpoints.layout.missing_files`.

    Raises:
        CheckpointError: one sentence; the checkpoint before stays in charge.
    """

    def missing() -> list[str]:
        return missing_files(folder, world_size, writers, contents, teachers)

    if not _within(PATIENCE_S, lambda: not missing()):
        lost = missing()
        raise CheckpointError(
            f"{lost[0]} is missing in {folder} ({len(lost)} missing in all): a rank wrote elsewhere, or the disk is "
            "full; the run ends, since it would go on without checkpoints."
        )


def load_resharded(engine: Any, folder: Path) -> bool:
    """Load verl's files of another number of ranks, or of one replica, into verl's ``engine`` (all ranks together).

    Returns:
        Whether it did: where each rank has saved a file of its own, verl loads, which restores the RNG of all, too.

    Raises:
        CheckpointError: it is incomplete, or of another model.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if reshard.fits(folder, MODEL, ranks):
        return False
    manager = engine.checkpoint_manager
    if manager.should_load_model:
        reshard.load_weights(engine.module, Shards(folder, MODEL))
    if manager.should_load_optimizer:
        reshard.load_optimiser(engine.optimizer, folder)
        if engine.is_optimizer_offload_enabled:
            engine.to(device="cpu", model=False, optimizer=True, grad=False)
    if manager.should_load_extra and (rng := reshard.load_extra(engine.lr_scheduler, folder, rank)) is not None:
        manager.load_rng_state(rng)
    torch.distributed.barrier()
    return True


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it holds now or soon."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
