# SPDX-License-Identifier: Apache-2.0
"""What `recipes/ray/submit.sh` hands to `ray job submit`; `tests/stack/test_ray_job.py` has a real cluster run jobs."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "recipes" / "ray" / "submit.sh"
RECIPE = ROOT / "recipes" / "crisp" / "tiny_cpu.sh"

# Answers the probe, and keeps the runtime environment of a submission, which the script deletes when it ends.
RAY = """#!/usr/bin/env bash
set -e
printf '%s\\n' "$*" >>"$KEPT/calls"
while (($#)); do
    if [[ $1 == --runtime-env ]]; then cp "$2" "$KEPT/runtime_env.json"; fi
    shift
done
"""


@pytest.fixture
def submit(tmp_path):
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    program.write_text(RAY)
    program.chmod(0o755)

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "KEPT": str(tmp_path),
            "OPD_VENV": str(tmp_path / "none"),
        }
        return subprocess.run(
            [SUBMIT, RECIPE, "--no-follow", *arguments],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def sent(kept: Path) -> dict[str, str]:
    return json.loads((kept / "runtime_env.json").read_text())["env_vars"]


def test_variables_of_the_run_and_the_network_reach_the_job_and_those_of_this_machine_do_not(submit, tmp_path):
    wanted = {
        "OPD_RUNS": "/runs",
        "HF_HOME": "/hf",
        "WANDB_MODE": "offline",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "https_proxy": "http://proxy:3128",
        "NO_PROXY": "10.0.0.0/8",
    }
    kept_back = {"OPD_WARM_PYTHON": "0", "VLLM_HOST_IP": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "0", "MY_NCCL_X": "1"}
    done = submit(**wanted, **kept_back)
    assert done.returncode == 0, done.stderr
    assert sent(tmp_path) == wanted


def test_named_variables_reach_the_job_by_file_with_every_character(submit, tmp_path):
    arguments = ["--env", "UCX_TLS", "--env", "A=b=c d\n'e\"", "--env", "NCCL_DEBUG=INFO", "--env", "EMPTY="]
    done = submit(*arguments, UCX_TLS="rc", NCCL_DEBUG="WARN")
    assert done.returncode == 0, done.stderr
    assert sent(tmp_path) == {"UCX_TLS": "rc", "A": "b=c d\n'e\"", "NCCL_DEBUG": "INFO", "EMPTY": ""}
    assert "UCX_TLS" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--env"], "--env needs NAME or NAME=VALUE"),
        (["--env", "NOT_SET"], "NOT_SET is not set here"),
        (["--env", "1A=b"], "'1A' is not a name of a variable"),
    ],
)
def test_a_variable_that_cannot_be_passed_on_is_refused(submit, tmp_path, arguments, sentence):
    done = submit(*arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / "runtime_env.json").exists()
