# SPDX-License-Identifier: Apache-2.0
"""Real runs: Ray, a vLLM server and FSDP2 on the CPU.

Runs join one Ray head per session, whose workers are forked from one process that has imported the stack (see
:mod:`opd_ext.bridge.warm_python`); everything else is as a user has it. ``alone=True`` is exactly what a user types.
"""

import json
import multiprocessing.spawn
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd_ext.bridge.warm_python import WarmPython
from opd_ext.launch import PATH_VARIABLE

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600  # of one run; most take half a minute on two cores

# Small batches and short responses: these tests are about mechanism.
SMALL = [
    "data.train_batch_size=8",
    "data.max_response_length=64",
    "data.val_max_samples=16",
    "actor_rollout_ref.actor.optim.lr=3e-4",
    "trainer.test_freq=-1",
    "trainer.val_before_train=false",
    "trainer.save_freq=1",
    "trainer.max_actor_ckpt_to_keep=null",
]

# What the processes of a CPU run have in their environment when they import verl and torch.
PLATFORM = {"VERL_PLATFORM": "cpu", "TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Stack:
    """What the runs of a session share: a warm Python and a Ray head with its dashboard."""

    python: str
    address: str
    dashboard: str
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """Makes a run use the warm Python, and able to speak to the head."""
        return {
            **PLATFORM,
            PATH_VARIABLE: self.python,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2)
    except urllib.error.HTTPError:
        return True  # it asks for the token, so it is there
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """A warm Python, and a Ray head with four pretend accelerators, apart from any other Ray on this machine."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    ports = [free_port() for _ in range(4)]
    temporary = f"/tmp/opd-ray-{os.getpid()}"  # sockets below it: its path must be short
    command = ["ray", "start", "--head", "--block", "--num-gpus", "4", "--num-cpus", "64"]
    command += ["--port", str(ports[0]), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(ports[1])]
    command += ["--ray-client-server-port", str(ports[2]), "--dashboard-agent-listen-port", str(ports[3])]
    command += ["--temp-dir", temporary]
    with WarmPython({**os.environ, **PLATFORM}) as python:
        shared = Stack(python.path, f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", str(token))
        env = {**os.environ, **shared.environment}
        head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not _answers(shared.dashboard):
            assert head.poll() is None and time.monotonic() < deadline, "the Ray head did not start"
            time.sleep(0.2)
        yield shared
        head.send_signal(signal.SIGTERM)
        head.wait(60)


@pytest.fixture(scope="module", autouse=True)
def warm(stack) -> Iterator[None]:
    """What a test here starts by itself, processes of multiprocessing included, starts warm."""
    cold = multiprocessing.spawn.get_executable()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PLATFORM, PATH_VARIABLE: stack.python}.items():
            patch.setenv(name, value)
        multiprocessing.set_executable(stack.python)
        yield
        multiprocessing.set_executable(cold)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """``$OPD_HOME`` with the miniature world as it ships."""
    from opd_ext.tinymath.build import build

    home = tmp_path_factory.mktemp("home")
    build(home / "tinymath", progress=False)
    return home


def command(run_dir: Path, *overrides: str, python: str = sys.executable) -> list[str]:
    """The command line of a run in ``run_dir``."""
    return [python, "-m", "opd_ext.train", *SMALL, f"opd.run_dir={run_dir}", *overrides]


def environment(world: Path) -> dict[str, str]:
    """This environment with the tests' world."""
    return {**os.environ, "OPD_HOME": str(world), "RAY_DEDUP_LOGS": "0"}


def alone(world: Path) -> dict[str, str]:
    """A user's environment: nothing that this session shares, but the tests' world."""
    return {name: value for name, value in environment(world).items() if name not in (*PLATFORM, PATH_VARIABLE)}


def finish(arguments: list[str], env: dict[str, str], cwd: Path) -> str:
    """Run to the end and return what it printed; a failure fails the test with the end of its output."""
    done = subprocess.run(
        arguments, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


@dataclass(frozen=True)
class Train:
    """``train(run_dir, *overrides)`` runs `opd train` to its end on the session's stack and returns its output."""

    world: Path
    stack: Stack

    @property
    def environment(self) -> dict[str, str]:
        """Of a run that joins the session's stack."""
        return {**environment(self.world), **self.stack.environment, "RAY_ADDRESS": self.stack.address}

    def __call__(self, run_dir: Path, *overrides: str, **variables: str) -> str:
        arguments = command(run_dir, *overrides, python=self.stack.python)
        return finish(arguments, self.environment | variables, run_dir.parent)

    def alone(self, run_dir: Path, *overrides: str) -> str:
        """The same as a user types it: a Python and a Ray of its own."""
        return finish(command(run_dir, *overrides), alone(self.world), run_dir.parent)


@pytest.fixture(scope="session")
def train(world, stack) -> Train:
    return Train(world, stack)


def metrics(run_dir: Path, phase: str = "train") -> list[dict]:
    """The lines of ``metrics.jsonl`` of one phase, in order."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == phase]


def shards(run_dir: Path, step: int, part: str) -> list[dict]:
    """Per rank, name -> local tensor of the checkpoint's ``actor`` weights, or of a folder with a teacher's."""
    import torch
    from torch.distributed.tensor import DTensor

    folder = run_dir / "checkpoints" / f"global_step_{step}" / part
    pattern = "model_world_size_*_rank_*.pt" if part == "actor" else "world_size_*_rank_*.pt"
    ranks = [torch.load(file, weights_only=False, map_location="cpu") for file in sorted(folder.glob(pattern))]
    assert ranks, f"no {part} shards in {folder}"
    return [{k: v.to_local() if isinstance(v, DTensor) else v for k, v in rank.items()} for rank in ranks]
