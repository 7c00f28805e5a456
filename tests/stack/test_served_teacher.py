# SPDX-License-Identifier: Apache-2.0
"""A teacher on a vLLM of its own is the teacher beside the student: value, gradient, and what it says after a move.

vLLM in actors of a real Ray, engines in real FSDP2 processes. vLLM's kernels are others than those of transformers:
what is compared differs by rounding, of float32.
"""

import dataclasses
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from opd_ext.errors import RunError
from opd_ext.launch import PATH_VARIABLE
from opd_ext.teacher import copy_shards, ema_shards
from opd_ext.teacher.config import ServingConfig
from tests.stack.conftest import command, metrics, shards
from tests.stack.engine_cases import DIVERGENCES, METHODS, MIXED, SAMPLES, SOME
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import EngineSpec, Update, save_models
from tests.stack.replay import in_prompt_order, replay

# Two float32 computations of the same hidden states by other kernels. Measured over all updates below, on one rank:
# loss 2.3e-7, metrics 3.7e-7, gradients 4.8e-7; twenty times that is the bound that docs/teachers.md names.
EXACT = 1e-5
NARROW = "wide, narrow"  # in bfloat16
SERVED = ("untied_teacher", "untied_teacher, again", "tied_teacher", "wide", NARROW)
WIDE = 40  # hidden units of `wide`
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

        dtype = "bf16" if name == NARROW else "fp32"
        precision = f"actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype={dtype}"
        config = compose_config(["method=crisp", "scale=cpu_tiny", "opd.max_pair_length=200", precision])
        arguments = engine_arguments(ServingConfig(), config, str(self.folder / name.split(",")[0]))
        variables = {"VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        warm = {"py_executable": self.python, "env_vars": variables | {PATH_VARIABLE: self.python}}
        actor = ray.remote(num_cpus=0)(TeacherServer).options(name=name, runtime_env=warm).remote(arguments)
        ray.get(actor.ready.remote(), timeout=300)
        return actor


def both(rank: Rank, updates: dict[str, Update], servers: Servers) -> dict:
    """Gradients of every update by a teacher beside the student, and by one on servers; and what else it is asked."""
    servers.reach(rank)
    served = {name: dataclasses.replace(update, served=True) for name, update in updates.items()}
    found = {name: (rank.gradients(update), rank.gradients(served[name])) for name, update in updates.items()}
    return {"updates": found, "moved": moved(rank), "traffic": traffic(rank), "refused": refused(rank)}


def moved(rank: Rank) -> dict:
    """The next update, by either teacher, after a copy and after a step of a moving average, of either projection."""
    found = {}
    for student in ("untied", "tied"):
        spec = EngineSpec(f"{student}_teacher", forward_only=True)
        served = rank.served(rank.worker(EngineSpec(student)).engine, spec.model, rank.worker(spec).engine)
        before = {name: shard.clone() for name, shard in rank.local_shards(spec).items()}
        for how in ("ema", "copy"):
            source, target = rank.local_shards(EngineSpec(student)), rank.local_shards(spec)
            ema_shards(source, target, 0.3) if how == "ema" else copy_shards(source, target)
            served.push()
            here = Update(SAMPLES, student, spec.model)
            found[student, how] = rank.gradients(here), rank.gradients(dataclasses.replace(here, served=served))
        copy_shards(before, rank.local_shards(spec))
        served.push()
    return found


def traffic(rank: Rank) -> dict[str, tuple[int, int]]:
    """Bytes and rows of a batch, by the dtype of the server."""
    found = {}
    for dtype, model in (("float32", "wide"), ("bfloat16", NARROW)):
        served = rank.served(rank.worker(EngineSpec("untied")).engine, model)
        served.traffic()
        rank.gradients(Update(SAMPLES, teacher="wide", served=served))
        found[dtype] = served.traffic()[1:]
    return found


def refused(rank: Rank) -> dict[str, str]:
    """What is said where a server has other weights, and where it does not answer."""
    student, found = rank.worker(EngineSpec("untied")).engine, {}
    for why, changes in (("other weights", {"version": 7}), ("no answer", {"serving": ServingConfig(seconds=1e-4)})):
        served = rank.served(student, "untied_teacher")
        kept = {name: getattr(served, name) for name in changes}
        for name, value in changes.items():
            setattr(served, name, value)
        try:
            rank.gradients(Update(SAMPLES, served=served))
        except RunError as error:
            found[why] = str(error)
        for name, value in kept.items():
            setattr(served, name, value)
    return found


@pytest.fixture(scope="module")
def servers(folder, stack):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.environment.items():
            patch.setenv(name, value)
        yield Servers(folder, stack.address, stack.python)


@pytest.fixture(scope="module")
def one(folder, servers):
    return run_ranks(1, folder, functools.partial(both, updates=UPDATES, servers=servers))[0]


@pytest.fixture(scope="module", params=[(2, 1), (2, 2)], ids=["two_ranks", "shared_sequences"])
def several(request, folder, servers):
    """Both ranks': of two that have sequences of their own, and of two that share each."""
    ranks, shared = request.param
    return run_ranks(ranks, folder, functools.partial(both, updates=UPDATES, servers=servers), shared)


def assert_same(here: dict, there: dict) -> None:
    assert there["loss"] == pytest.approx(here["loss"], abs=EXACT)
    assert here["metrics"].keys() == there["metrics"].keys()
    for name, value in here["metrics"].items():
        assert there["metrics"][name] == pytest.approx(value, abs=EXACT, rel=EXACT), name
    for name, grad in here["grads"].items():
        torch.testing.assert_close(there["grads"][name], grad, rtol=0, atol=EXACT * max(1.0, grad.abs().max().item()))


@pytest.mark.parametrize("name", UPDATES)
def test_loss_metrics_and_gradients_are_those_of_the_teacher_beside_the_student(one, name):
    here, there = one["updates"][name]
    assert any(grad.abs().max() > 100 * EXACT for grad in here["grads"].values()), "nothing would be compared"
    assert_same(here, there)


@pytest.mark.parametrize("how", ["ema", "copy"])
@pytest.mark.parametrize("student", ["untied", "tied"])
def test_a_teacher_that_has_moved_teaches_with_its_new_weights(one, student, how):
    here, there = one["moved"][student, how]
    assert_same(here, there)
    before = one["updates"]["tied" if student == "tied" else "reverse_kl"][0]["loss"]
    assert abs(here["loss"] - before) > 100 * EXACT, "it has not moved"


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_a_token_takes_as_many_bytes_as_its_hidden_state(one, dtype, width):
    sent, rows = one["traffic"][dtype]
    assert rows == sum(len(sample.response) for sample in SAMPLES)
    assert sent == rows * WIDE * width


def test_other_weights_and_silence_end_the_run_in_one_sentence(one):
    # Twice each of two kinds, it has moved, and come back.
    said = "RuntimeError: the teacher's server has version 3 of its weights, and version 7 is asked for"
    assert one["refused"]["other weights"] == f"The server of opd.teacher has failed: {said}"
    assert "has not answered within opd.teacher.vllm.seconds=0.0001" in one["refused"]["no answer"]


@pytest.mark.slow
def test_ranks_that_share_servers_or_sequences_are_taught_the_same(one, several):
    for name, (alone, _) in one["updates"].items():
        for rank in several:
            assert_same(alone, rank["updates"][name][1])
    for name, (alone, _) in one["moved"].items():
        for rank in several:
            assert_same(alone, rank["moved"][name][1])


STEPS = 3
EMA = ["method=crisp", "opd.teacher.weights=ema", "opd.teacher.rate=0.3"]
APART = ["teacher_server=vllm_cpu", "opd.teacher.vllm.tokens_per_call=300"]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """On the same rollouts: a teacher beside the student, one on a server, and that run after it lost its last step."""
    base = tmp_path_factory.mktemp("whole")
    settings = [*EMA, *replay(base / "dump", STEPS)]
    train(base / "beside", *settings)
    in_prompt_order(base / "dump")
    train(base / "apart", *settings, *APART)
    shutil.copytree(base / "apart", base / "resumed")
    shutil.rmtree(base / "resumed" / "checkpoints" / f"global_step_{STEPS}")
    (base / "resumed" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(STEPS - 1))
    train(base / "resumed", *settings, *APART)
    return base


@pytest.mark.slow
def test_a_run_with_a_served_teacher_is_the_run_with_it_beside_the_student(runs):
    """A moving teacher: its weights are sent after every step. Adam divides by what a gradient's noise is part of."""
    for here, there in zip(metrics(runs / "beside"), metrics(runs / "apart"), strict=True):
        for name in ("opd/loss", "opd/divergence", "opd/teacher_entropy", "teacher/version"):
            assert there[name] == pytest.approx(here[name], abs=EXACT), (here["step"], name)
        assert there["teacher/served/bytes_per_token"] == 4 * 128  # float32 of the miniature model
    for part in ("actor", "teacher"):
        (here,), (there,) = (shards(runs / name, STEPS, part) for name in ("beside", "apart"))
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor, rtol=0, atol=1e-4)  # a third of one step's lr of 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("part", ["actor", "teacher"])
def test_a_resumed_run_ends_with_the_same_bits(runs, part):
    for ours, theirs in zip(*(shards(runs / name, STEPS, part) for name in ("resumed", "apart")), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_server_without_a_place_ends_the_run_in_one_sentence(train, tmp_path):
    """The session's Ray has four pretended accelerators, one of which the trainer takes."""
    settings = ["method=crisp", "teacher_server=vllm_cpu", "opd.teacher.vllm.tensor_parallel_size=4"]
    words = command(tmp_path / "run", *settings, "opd.teacher.vllm.start_seconds=10")
    ended = subprocess.run(words, env=train.environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    *_, last = (ended.stdout + ended.stderr).split("opd train: ")
    assert ended.returncode == 1 and "The server of opd.teacher has not come up" in last, last
    assert "it asks for 1 x 4 devices, and Ray has 3 to give" in last, last
