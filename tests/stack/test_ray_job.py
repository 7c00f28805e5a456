# SPDX-License-Identifier: Apache-2.0
"""A recipe submitted to a running Ray cluster: the job trains, its log is followed, its exit code comes back."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.stack.conftest import ROOT, SMALL, TIMEOUT_S, environment, metrics

SUBMIT = ROOT / "recipes" / "ray" / "submit.sh"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2)
    except urllib.error.HTTPError:
        return True  # it asks for the token, so it is there
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(world, tmp_path_factory):
    """A Ray head with two pretend accelerators, apart from any other Ray on this machine."""
    folder = tmp_path_factory.mktemp("r")  # short: Ray puts sockets below it
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {
        **environment(world),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OPD_RUNS": str(folder / "runs"),
    }
    address = f"http://127.0.0.1:{free_port()}"
    command = ["ray", "start", "--head", "--block", "--num-gpus", "2", "--num-cpus", "16"]
    command += ["--port", str(free_port()), "--dashboard-host", "127.0.0.1", "--dashboard-port", address.split(":")[-1]]
    command += ["--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port())]
    command += ["--temp-dir", f"/tmp/opd-ray-{os.getpid()}"]  # sockets below it: its path must be short
    head = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not answers(address):
        assert head.poll() is None and time.monotonic() < deadline, "the Ray head did not start"
        time.sleep(1)
    yield address, env
    head.send_signal(signal.SIGTERM)
    head.wait(60)


def submit(cluster, recipe: Path, *overrides: str) -> subprocess.CompletedProcess:
    address, env = cluster
    return subprocess.run(
        [SUBMIT, recipe, "--address", address, "--", *overrides],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_a_submitted_recipe_trains_and_reports(cluster):
    overrides = [*SMALL, "trainer.total_training_steps=1", "trainer.experiment_name=job", "trainer.save_freq=-1"]
    done = submit(cluster, ROOT / "recipes" / "crisp" / "tiny_cpu.sh", *overrides)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "1/1" in done.stdout  # the followed log holds the row of the step
    assert len(metrics(Path(cluster[1]["OPD_RUNS"]) / "job")) == 1


def test_a_refused_configuration_comes_back_as_a_failed_job(cluster):
    done = submit(cluster, ROOT / "recipes" / "crisp" / "tiny_cpu.sh", "opd.teacher.weights=stale")
    assert done.returncode == 2, done.stdout[-4000:]
    assert "choose one of: base, ema, external, frozen, live, periodic" in done.stdout


def test_a_recipe_that_does_not_exist_is_refused_before_anything_is_submitted(cluster):
    done = submit(cluster, ROOT / "recipes" / "nothing.sh")
    assert done.returncode == 2 and "nothing.sh" in done.stdout
