# SPDX-License-Identifier: Apache-2.0
"""A teacher on a vLLM of its own is the teacher beside the student: value, gradient, and what it says after a move.

vLLM in actors of a real Ray, engines in real FSDP2 processes. vLLM's kernels are others than those of transformers:
what is compared differs by rounding, of float32.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from opd_ext.launch import PATH_VARIABLE
from tests.stack.engine_harness import Rank, Update, run_ranks, save_models
from tests.stack.test_engine import DIVERGENCES, METHODS, MIXED, SAMPLES, SOME

# Two float32 computations of the same hidden states, of unit scale after the last norm, by other kernels: measured
# 3e-6 there, and below 1e-6 in a mean over tokens. The bound that issue and docs name is 1e-5.
EXACT = 1e-5
SERVED = ("untied_teacher", "untied_teacher, again", "tied_teacher", "wide")
UPDATES = {
    "reverse_kl": Update(SAMPLES),
    "tied": Update(SAMPLES, "tied", "tied_teacher"),
    **{name: Update(SAMPLES, objective=objective) for name, objective in DIVERGENCES.items()},
    **{name: update for name, update in METHODS.items() if update.teacher is not None or update.several},
    "several": Update(SOME, several=MIXED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    save_models(path, head_dim=32)  # the smallest that attention of vLLM takes on a CPU
    return path


@dataclasses.dataclass
class Servers:
    """A replica of every teacher, and two of one, on the session's Ray; ranks find them by their names.

    The first rank starts them, and they end with it.
    """

    folder: Path
    address: str
    python: str

    def reach(self, rank: Rank) -> None:
        ray.init(address=self.address, namespace=self.folder.name, logging_level="ERROR")
        if rank.rank == 0:
            self.actors = [self.start(name) for name in SERVED]
        torch.distributed.barrier()

    def start(self, name: str) -> Any:
        from opd_ext.bridge.teacher_server import TeacherServer, engine_arguments
        from opd_ext.config.compose import compose_config
        from opd_ext.teacher.config import ServingConfig

        config = compose_config(["method=crisp", "scale=cpu_tiny", "opd.max_pair_length=200"])
        arguments = engine_arguments(ServingConfig(), config, str(self.folder / name.split(",")[0]))
        variables = {"VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        warm = {"py_executable": self.python, "env_vars": variables | {PATH_VARIABLE: self.python}}
        actor = ray.remote(num_cpus=0)(TeacherServer).options(name=name, runtime_env=warm).remote(arguments)
        ray.get(actor.ready.remote(), timeout=300)
        return actor


def both(rank: Rank, updates: dict[str, Update], servers: Servers) -> dict:
    """Gradients of every update by a teacher beside the student, and by one on servers."""
    servers.reach(rank)
    served = {name: dataclasses.replace(update, served=True) for name, update in updates.items()}
    return {name: (rank.gradients(update), rank.gradients(served[name])) for name, update in updates.items()}


@pytest.fixture(scope="module")
def servers(folder, stack):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.environment.items():
            patch.setenv(name, value)
        yield Servers(folder, stack.address, stack.python)


@pytest.fixture(scope="module")
def one(folder, servers):
    return run_ranks(1, folder, functools.partial(both, updates=UPDATES, servers=servers))[0]


def assert_same(here: dict, there: dict) -> None:
    assert there["loss"] == pytest.approx(here["loss"], abs=EXACT)
    assert here["metrics"].keys() == there["metrics"].keys()
    for name, value in here["metrics"].items():
        assert there["metrics"][name] == pytest.approx(value, abs=EXACT, rel=EXACT), name
    for name, grad in here["grads"].items():
        torch.testing.assert_close(there["grads"][name], grad, rtol=0, atol=EXACT * max(1.0, grad.abs().max().item()))


@pytest.mark.parametrize("name", UPDATES)
def test_loss_metrics_and_gradients_are_those_of_the_teacher_beside_the_student(one, name):
    here, there = one[name]
    assert any(grad.abs().max() > 100 * EXACT for grad in here["grads"].values()), "nothing would be compared"
    assert_same(here, there)
