# SPDX-License-Identifier: Apache-2.0
"""A whole-model teacher that waits in host memory (``actor_rollout_ref.ref.fsdp_config.param_offload=true``).

Two runs of two real FSDP2 ranks, which split the batch or share its sequences, do the same: an update, an optimiser
step, the teacher's move, an update, and that update once more in new engines that load what was saved. One keeps the
teacher on the device, one streams it by FSDP2's policy. On a CPU both memories are one, so that this holds what is
computed, moved and saved under that policy, and not the copies between the memories.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd_ext.teacher.kinds import External, Frozen, MovingAverage, Periodic, Teacher, TrustRegion
from opd_ext.teacher.weights import copy_shards
from tests.stack.engine_cases import SAMPLES, identical
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import EngineSpec, Update, save_models
from tests.stack.test_adapter_teachers import built, gradients, same

RATE = 0.25
KINDS: dict[str, tuple[Teacher, str]] = {
    "frozen": (Frozen(), "untied"),
    "external": (External("wide"), "wide"),
    "periodic": (Periodic(1), "untied"),
    "ema": (MovingAverage(RATE), "untied"),
    "trust region": (TrustRegion(RATE), "untied"),
}
UPDATE = Update(SAMPLES)


class Run:
    """A student, a teacher with weights of its own, and the worker that moves and saves them."""

    def __init__(self, rank: Rank, name: str, offload: bool):
        from opd_ext.bridge.teachers import Tutor
        from opd_ext.bridge.worker import OPDWorker

        self.rank = Rank(rank.folder, rank.sequence_parallel)  # with engines of its own
        self.kind, model = KINDS[name]
        student = self.rank.worker(UPDATE.student)
        configs, engine, *others = self.rank.configs(EngineSpec(model, forward_only=True))
        self.held = built(rank, configs, dataclasses.replace(engine, param_offload=offload), *others)
        self.tutor = Tutor(self.kind, self.held.engine, UPDATE.objective)
        self.worker = object.__new__(OPDWorker)  # without a rollout
        held = {"teachers": {"": self.held}, "adapters": {}, "served": {}}
        vars(self.worker).update(actor=SimpleNamespace(engine=student.engine), **held)

    def update(self) -> dict:
        return gradients(self.rank, UPDATE, self.tutor)

    def student(self) -> dict[str, torch.Tensor]:
        return self.rank.local_shards(UPDATE.student)

    def teacher(self) -> dict[str, torch.Tensor]:
        from opd_ext.bridge.adapters import local_parts
        from opd_ext.bridge.worker import _distinct_tensors

        return {n: tensor.clone() for n, tensor in local_parts(_distinct_tensors(self.held.engine.module)).items()}

    def streams(self) -> bool:
        """Whether FSDP2 takes every weight of the teacher from host memory."""
        from torch.distributed.fsdp import FSDPModule

        units = [part for part in self.held.engine.module.modules() if isinstance(part, FSDPModule)]
        groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        found = {param.offload_to_cpu for group in groups if group for param in group.fsdp_params}
        assert len(found) == 1
        return found.pop()


def job(rank: Rank) -> dict:
    found = {}
    for way, ranks in (("split", rank), ("share", Rank(rank.folder, sequence_parallel=2))):
        for name in KINDS:
            found[name, way] = [_whole_run(ranks, name, offload, rank.folder / f"{name}-{way}") for offload in (0, 1)]
    return found


def _whole_run(rank: Rank, name: str, offload: bool, folder: Path) -> dict:
    run, saved = Run(rank, name, bool(offload)), str(folder / f"offload-{offload}")
    found = {"streams": run.streams(), "initial": run.teacher(), "before": run.update()}
    run.rank.train(UPDATE, back=False)
    found["student"] = {key: tensor.clone() for key, tensor in run.student().items()}
    if share := run.kind.share(step=1, updates=1):
        run.worker.refresh_teacher(share)
    found |= {"moved": run.teacher(), "after": run.update()}
    run.worker.save_teacher(saved)
    torch.distributed.barrier()
    again = Run(rank, name, bool(offload))
    copy_shards(found["student"], again.student())
    again.worker.load_teacher(saved)
    return found | {"loaded": again.teacher(), "resumed": again.update()}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("offloaded")
    save_models(folder)
    return run_ranks(2, folder, job)


ways = pytest.mark.parametrize("way", ["split", "share"])
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", KINDS), ways]


@pytest.mark.parametrize("when", ["before", "after", "resumed"])
def test_value_and_gradient_are_those_without_offload(found, name, way, when):
    """To the bit: the same kernels get the same numbers, wherever they have waited."""
    for rank in found:
        resident, offloaded = rank[name, way]
        assert identical(offloaded[when], resident[when]) and offloaded[when]["metrics"] == resident[when]["metrics"]
        assert resident[when]["loss"] != 0 and resident["before"]["loss"] != resident["after"]["loss"]


def test_fsdp_streams_the_weights_of_that_run_alone(found, name, way):
    for rank in found:
        assert [run["streams"] for run in rank[name, way]] == [False, True]


def test_the_teacher_has_moved_as_its_schedule_says(found, name, way):
    kind, _ = KINDS[name]
    for rank in found:
        for run in rank[name, way]:
            initial, moved, student = run["initial"], run["moved"], run["student"]
            if not kind.moves:
                assert same(moved, initial)
                continue
            assert not same(student, initial)
            share = kind.share(step=1, updates=1)
            for key, value in moved.items():
                expected = (1 - share) * initial[key].double() + share * student[key].double()
                # Weights of unit scale in float32, rounded once.
                assert torch.allclose(value.double(), expected, rtol=0, atol=1e-7 if share < 1 else 0), key


def test_a_resumed_run_asks_the_same_teacher(found, name, way):
    for rank in found:
        for run in rank[name, way]:
            assert same(run["loaded"], run["moved"]) and identical(run["resumed"], run["after"])
