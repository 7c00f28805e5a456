# SPDX-License-Identifier: Apache-2.0
"""A run over two Ray nodes, which are two raylets of this machine: with one disk, and each with a disk of its own."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.stack.conftest import ROOT, TIMEOUT_S, alone, command, finish, free_port, metrics, shards

# One rank on each node; the teacher is a copy, whose shards lie beside the student's.
TWO = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", "opd.teacher.interval=1", "opd.warm_python=false"]
TWO += ["data.max_response_length=48", "data.val_max_samples=8"]

pytestmark = pytest.mark.slow  # two raylets, whose processes start cold


@contextmanager
def cluster(environment: dict[str, str], private: Path | None = None) -> Iterator[dict[str, str]]:
    """Two Ray nodes with one pretend accelerator each; gives the environment of a run that joins them.

    Args:
        environment: a user's. What is forked from the session's warm Python has that one's mounts, whatever its node's.
        private: folder in whose place the second node has a disk of its own, in a mount namespace.
    """
    scratch = tempfile.mkdtemp(prefix="ray")  # sockets below it: its path must be short
    address = f"127.0.0.1:{free_port()}"
    joined = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "c0ffee" * 8, "RAY_USAGE_STATS_ENABLED": "0"}
    joined |= {"RAY_TMPDIR": scratch, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    node = ["ray", "start", "--block", "--num-gpus=1", "--num-cpus=12", "--dashboard-agent-listen-port=0"]
    head = [*node, "--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    head += [f"--ray-client-server-port={free_port()}", f"--temp-dir={scratch}"]
    second = [*node, f"--address={address}"]
    if private:
        mounted = f"mount -t tmpfs tmpfs {shlex.quote(str(private))} && exec {shlex.join(second)}"
        second = ["unshare", "--mount", "sh", "-c", mounted]

    def nodes() -> int:
        return _status(address, joined).count("node_")

    with ExitStack() as started:
        started.callback(shutil.rmtree, scratch, ignore_errors=True)
        for number, start in enumerate((head, second), start=1):
            process = subprocess.Popen(start, env=joined, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            started.callback(_stop, process)
            _until(lambda: nodes() == number, process)  # noqa: B023 (asked before the next one)
        yield joined | {"RAY_ADDRESS": address}


def _status(address: str, environment: dict[str, str]) -> str:
    asked = ["ray", "status", f"--address={address}"]
    return subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=60).stdout


def _until(there: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, "a Ray node did not start"
        time.sleep(1)


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def test_two_nodes_with_one_disk_train_save_and_go_on(world, tmp_path):
    run_dir = tmp_path / "two"
    with cluster(alone(world)) as env:
        finish(command(run_dir, *TWO, "trainer.total_training_steps=2"), env, tmp_path)
        said = finish(command(run_dir, *TWO, "trainer.total_training_steps=3"), env, tmp_path)
    assert "global_step_2" in said and [line["step"] for line in metrics(run_dir)] == [1, 2, 3]
    for step in (1, 2, 3):
        assert len(shards(run_dir, step, "actor")) == len(shards(run_dir, step, "teacher")) == 2
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_nodes_without_a_shared_disk_are_refused_before_the_first_step(world, tmp_path):
    """Such a run once ended as if all were well; each node held its half of every checkpoint."""
    runs = tmp_path / "runs"
    runs.mkdir()
    with cluster(alone(world), private=runs) as env:
        done = subprocess.run(
            command(runs / "two", *TWO, "trainer.total_training_steps=2"),
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode != 0, done.stdout[-4000:]
    # By which node Ray gives the trainer: that with the run folder, or the other one.
    ranks, trainer = "is not the same folder on every node: what 1 of 2 ranks write there", "/two is not on node "
    assert ranks in done.stdout or trainer in done.stdout, done.stdout[-4000:]
    assert not list(runs.glob("two/checkpoints/global_step_*")) and not (runs / "two" / "metrics.jsonl").exists()


def test_a_group_of_ranks_spans_nodes_and_what_no_node_has_is_refused(tmp_path):
    """The launcher of pipelines: two ranks on each of two nodes meet, as torchrun would let them."""
    script = """
        import sys
        from pathlib import Path
        from opd_ext.launch import Command, LaunchError, run
        out = Path(sys.argv[1])
        command = lambda **sizes: Command("tests.stack.group_of_ranks", [str(out / "met.json")], out / "log", **sizes)
        run([command(ranks=4, devices=4, nodes=2)], "cpu")
        try:
            run([command(ranks=2, devices=2)], "cuda")
        except LaunchError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OPD_"))}
    environment |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with cluster(environment) as joined:
        asked = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
        done = subprocess.run(asked, env=joined, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = json.loads((tmp_path / "met.json").read_text())
    assert [rank["RANK"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks} == {("4", "2")}
    nodes = [rank["raylet"] for rank in ranks]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert "1 node(s) of 2 GPUs and 2 CPUs are wanted" in done.stdout and "set train.nodes" in done.stdout
