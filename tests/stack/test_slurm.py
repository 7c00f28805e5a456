# SPDX-License-Identifier: Apache-2.0
"""`recipes/ray/slurm.sh` on two nodes that are Ray nodes of this machine: SLURM is played, Ray is real."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.stack.conftest import ROOT

# Runs the command once per task, as srun does, and hands a signal on. Ray nodes on one machine need ports of their own.
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
tasks=1 pids=()
while [[ $1 == --* ]]; do
    if [[ $1 == --ntasks=* ]]; then tasks=${1#*=}; fi
    shift
done
own=()
if [[ $1 == ray ]]; then own=(--num-cpus=2 --dashboard-agent-listen-port=0 --metrics-export-port=0); fi
trap 'kill "${pids[@]}"; wait; exit 143' TERM
for ((task = 0; task < tasks; task++)); do "$@" "${own[@]}" & pids+=($!); done
wait
"""
SCONTROL = '#!/usr/bin/env bash\n[[ "$*" == "show hostnames n[1-2]" ]] && printf "n1\\nn2\\n"\n'


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def slurm(tmp_path):
    scratch = tempfile.mkdtemp(prefix="ray")  # sockets below it: its path must be short
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OPD_"))}
        return subprocess.run(
            ["bash", ROOT / "recipes" / "ray" / "slurm.sh", "recipes/crisp/tiny_cpu.sh", *arguments],
            cwd=tmp_path,
            env={
                **clean,
                "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "SLURM_JOB_NODELIST": "n[1-2]",
                "SLURM_SUBMIT_DIR": str(ROOT),
                "SLURM_CPUS_ON_NODE": "96",
                "OPD_RAY_HEAD_IP": "127.0.0.1",
                "OPD_RAY_PORT": free_port(),
                "OPD_RAY_DASHBOARD_PORT": free_port(),
                "OPD_RAY_WAIT": "120",
                "OPD_RUNS": str(tmp_path / "runs"),
                "RAY_TMPDIR": scratch,  # Ray notes there which cluster is the machine's: not where others look
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )

    yield run
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow  # starts two Ray nodes
def test_the_recipe_is_told_the_number_of_nodes(slurm, tmp_path):
    done = slurm("--", "--cfg")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "nnodes: 2" in done.stdout
    head, worker = (tmp_path / "calls").read_text().splitlines()
    assert "--nodelist=n1 ray start --head" in head and "--nodelist=n2 ray start --block" in worker
    assert "--ntasks=1" in worker and "--cpus-per-task=96" in worker
