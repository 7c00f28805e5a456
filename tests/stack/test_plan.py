# SPDX-License-Identifier: Apache-2.0
"""A plan's bytes of a checkpoint are those in the files that two ranks of the real engine write."""

import dataclasses
from pathlib import Path

import torch

from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.run import Sharding
from opd_ext.plan.shapes import of_folder
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import EngineSpec, Update, make_samples, save_models


@dataclasses.dataclass(frozen=True)
class _Files:
    """What the plan reads of a run."""

    student: object
    trained: int
    trained_tensors: int
    sharding: Sharding = Sharding(shards=2, master=4, compute=4)
    ranks: int = 2
    adapter: int = 0
    teachers: tuple = ()
    moving: tuple = ()
    teacher_adapters: int = 0


def _save(rank: Rank) -> dict:
    """One update, so that moments exist, and a checkpoint; bytes of all tensors in this rank's two files."""
    rank.train(Update(make_samples([4, 6])))
    engine = rank.worker(EngineSpec("untied")).engine
    engine.save_checkpoint(local_path=str(rank.folder / "checkpoint"))
    found = {}
    for part, file in (("model", "model"), ("optimizer", "optim")):
        path = rank.folder / "checkpoint" / f"{file}_world_size_2_rank_{rank.rank}.pt"
        found[part] = _bytes(torch.load(path, weights_only=False))
    return found


def _bytes(value) -> int:
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes(item) for item in value)
    if isinstance(value, torch.Tensor):
        local = value.to_local() if hasattr(value, "to_local") else value
        return local.numel() * local.element_size()
    return 0


def test_a_checkpoint_has_the_bytes_that_the_plan_says(tmp_path):
    save_models(tmp_path)
    ranks = run_ranks(2, tmp_path, _save)
    shape = of_folder(Path(tmp_path) / "untied")
    planned = checkpoint_bytes(_Files(shape, shape.parameters, shape.tensors))
    assert {part: sum(rank[part] for rank in ranks) for part in planned} == planned
