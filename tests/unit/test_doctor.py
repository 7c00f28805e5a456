# SPDX-License-Identifier: Apache-2.0
"""`opd doctor`: every fault becomes one sentence and exit status 1, and the pins have one source."""

import io
import json
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from rich.console import Console

from opd_ext import doctor, versions
from opd_ext.doctor import check, devices, machine, network, software

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """Installed distributions are looked up along sys.path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_every_distribution_has_one_exact_pin(stack):
    lines = (ROOT / "opd_ext" / "constraints" / f"{stack}.txt").read_text().splitlines()
    requirements = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?', line) for line in requirements)
    # One line for all Pythons, or one on each side of 3.11: never two that hold at once.
    keys = Counter()
    for line in requirements:
        name, _, marker = line.partition(";")
        name = canonicalize_name(name.split("==")[0])
        keys.update([(name, side) for side in ("<", ">=") if not marker or f" {side} " in marker])
    assert max(keys.values()) == 1


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_what_the_package_fixes_is_what_the_constraints_pin(stack):
    wanted = versions.pins(stack)
    declared = re.search(rf"^{stack} = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    exact = dict(re.findall(r'"([\w.-]+)(?:\[\w+\])?==([\w.]+)', declared))
    assert exact["torch"]
    assert {name: wanted[canonicalize_name(name)] for name in exact} == exact


def test_both_stacks_pin_the_same_verl():
    assert versions.pins("cpu")["verl"] == versions.pins("gpu")["verl"] == "0.9.1"


def test_a_local_suffix_names_a_build_of_the_same_version():
    assert versions.Comparison("torch", "2.13.0", "2.13.0+cpu").agrees
    assert not versions.Comparison("torch", "2.13.0", "2.13.1").agrees
    assert not versions.Comparison("torch", "2.13.0", None).agrees


def test_a_missing_distribution_is_a_problem_that_names_the_remedy(nothing_installed):
    checks = {row.subject: row for row in software.check_versions("gpu")}
    assert checks["vllm"].found == "missing"
    assert checks["vllm"].problem == "vllm is missing, tested with 0.24.0; run `bash setup.sh --gpu`."


def test_the_gpu_stack_without_a_gpu_is_a_problem():
    told = devices.check_devices("gpu", [], "there is no nvidia-smi").problem
    assert told == (
        "The GPU stack is installed and no GPU answers (there is no nvidia-smi); check the driver and `--gpus all`."
    )
    assert devices.check_devices("cpu", []).problem is None


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A driver that answers with these lines, and fails if it is asked for something else than doctor asks."""

    def install(*lines: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        text = "\\n".join(lines)
        query = "--query-gpu=name,memory.total,memory.used,driver_version --format=csv,noheader,nounits"
        program.write_text(f'#!/bin/sh\n[ "$*" = "{query}" ] || exit 9\nprintf "{text}\\n"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


H200 = "NVIDIA H200, 143771, 4, 580.95.05"


def test_equal_gpus_are_counted(nvidia_smi):
    nvidia_smi(*[H200] * 8)
    gpus = devices.installed_gpus()
    assert devices.check_devices("gpu", gpus).found.startswith("8 x NVIDIA H200, 140 GiB; CPU, ")
    assert not [check for check in doctor.check_gpu_stack(gpus)[:2] if check.problem]


@pytest.mark.parametrize(
    ("named", "left"), [("0,1", 2), ("GPU-5a8, GPU-5a9", 2), ("3,9,1", 1), ("-1", 0), ("", 0), ("7", 1)]
)
def test_the_gpus_of_a_run_are_those_that_cuda_leaves(monkeypatch, named, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    gpus = [devices.Gpu(f"card {index}", 81559, 4, "580.95.05") for index in range(8)]
    assert len(devices.usable(gpus)) == left
    assert ("leaves none of 8 GPUs" in (devices.check_devices("gpu", gpus).problem or "")) == (left == 0)


@pytest.mark.parametrize(
    ("driver", "old"), [("570.172.08", True), ("580.65.06", False), ("580.7", True), ("595.1", False)]
)
def test_an_old_driver_is_a_problem(nvidia_smi, driver, old):
    nvidia_smi(f"NVIDIA H200, 143771, 4, {driver}")
    (row,) = devices.check_driver(devices.installed_gpus())
    assert bool(row.problem) == old


def test_set_up_and_doctor_ask_for_the_same_driver():
    (wanted,) = re.findall(r"^min_driver=([\d.]+)$", (ROOT / "setup.sh").read_text(), re.M)
    assert wanted == devices.MIN_DRIVER


def test_a_driver_that_fails_is_quoted(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.", status=9)
    with pytest.raises(devices.NoDriver, match="could not communicate with the NVIDIA driver"):
        devices.installed_gpus()


def test_a_gpu_that_another_process_fills_is_a_problem(nvidia_smi):
    nvidia_smi(H200, "NVIDIA H200, 143771, 71680, 580.95.05", "NVIDIA H200 MIG, [N/A], [N/A], 580.95.05")
    (row,) = devices.check_gpu_memory(devices.installed_gpus())
    assert row.problem.startswith("1 of 3 GPUs hold memory of other processes, up to 70 GiB;")


def test_a_node_needs_what_its_recipes_take():
    """Four checkpoints of Qwen3-8B under CRISP: 8.19e9 parameters of 12 bytes, and a bf16 teacher."""
    node = check.needs("gpu", 8)
    assert node.disk >= 4 * 8.19e9 * 14 / 2**30
    assert node.shm == 64 and node.files == 65536
    assert check.needs("gpu", 0) == check.needs("gpu", 1)  # a driver that is mended tomorrow
    assert check.needs("cpu", 8) == check.needs("cpu", 0) == check.Needs(memory=6, disk=5, shm=2, files=8192)


def test_what_a_machine_lacks_is_a_problem_and_what_it_has_is_none(tmp_path):
    there = tmp_path / "not" / "yet"
    assert not machine.check_memory(0.001).problem and machine.check_memory(1e6).problem
    assert not machine.check_disk("disk", tmp_path, 0.001, "").problem
    assert machine.check_disk("disk", there, 1e6, "free some").problem.endswith("a run needs 1000000; free some.")
    assert machine.check_shared_memory(1e6).problem.count("--shm-size=1000000g") == 1
    assert "does not exist" in machine.check_shared_memory(1, tmp_path / "none").problem


def test_the_limit_of_open_files_is_the_one_that_ray_can_raise_to(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert machine.check_open_files(4096).problem is None
    assert "--ulimit nofile=65536" in machine.check_open_files(65536).problem
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    assert machine.check_open_files(65536).problem is None


@pytest.fixture
def fabric(tmp_path, monkeypatch):
    """/sys/class of a node with two InfiniBand adapters that are up, one that is down, and two interfaces."""
    for name in [name for name in os.environ if name.startswith(network.PREFIXES)]:
        monkeypatch.delenv(name)
    for adapter, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        port = tmp_path / "infiniband" / adapter / "ports" / "1"
        port.mkdir(parents=True)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / file).write_text(text + "\n")
    for interface in ("eth0", "lo"):
        (tmp_path / "net" / interface).mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "uverbs0").touch()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def test_infiniband_that_a_process_can_use_is_no_problem(fabric):
    row = network.check_infiniband(fabric, fabric / "dev", "libc.so.6")
    assert (row.found, row.problem) == ("2 x 400 Gb/sec (4X NDR) (InfiniBand)", None)


def test_a_node_without_infiniband_is_no_problem(tmp_path):
    row = network.check_infiniband(tmp_path, tmp_path)
    assert row.found.startswith("none") and row.problem is None


def test_what_keeps_nccl_from_infiniband_is_a_problem(fabric, monkeypatch):
    def look(dev=fabric / "dev", library="libc.so.6"):
        return network.check_infiniband(fabric, dev, library)

    assert "--device" in look(dev=fabric / "nothing").problem
    assert "apt-get install libibverbs1 librdmacm1 ibverbs-providers" in look(library="libnothing.so.1").problem
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8 * 2**20, 8 * 2**20))
    assert "may lock 8192 KiB" in look().problem and "memlock=-1" in look().problem
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert look().problem is None and look().found.endswith("switched off by NCCL_IB_DISABLE")


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),  # prefixes
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^lo,docker", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", False),
        ("NCCL_SOCKET_IFNAME", "ib0", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_IB_HCA", "mlx5_1:1", True),
        ("NCCL_IB_HCA", "bnxt", False),
        ("NCCL_DEBUG", "INFO", True),
    ],
)
def test_a_variable_that_names_nothing_is_a_problem(fabric, monkeypatch, name, value, right):
    monkeypatch.setenv(name, value)
    row = network.check_communication(fabric)
    assert row.found == f"{name}={value}"
    assert (row.problem is None) if right else row.problem.startswith(f"{name}={value} names none")


def test_an_environment_without_the_package_is_told_to_install_it(nothing_installed):
    with pytest.raises(LookupError, match="opd-ext is not installed in this environment"):
        software.load_plugin()


def test_an_error_of_the_plugin_is_shown_and_fails_the_command(tmp_path, monkeypatch):
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nopd_ext = broken_plugin:register\n")
    (tmp_path / "broken_plugin.py").write_text("def register():\n    raise RuntimeError('no such seam')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    answer = subprocess.run([sys.executable, "-m", "opd_ext.cli", "doctor"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "The verl plugin does not load: RuntimeError: no such seam" in answer.stdout


def test_problems_become_sentences_and_the_exit_status():
    good = check.Check("memory", "20 GiB free")
    bad = check.Check("disk", "1 GiB free", ">= 5 GiB", "The disk is full; free [some] space.")
    page = io.StringIO()
    console = Console(file=page, width=80)
    assert doctor.tell([good, good], console) == 0
    assert "problem" not in page.getvalue()
    assert doctor.tell([good, bad], console) == 1
    assert page.getvalue().splitlines()[-1] == "The disk is full; free [some] space."


def test_a_program_reads_the_same_as_json():
    answer = subprocess.run([sys.executable, "-m", "opd_ext.cli", "doctor", "--json"], capture_output=True, text=True)
    told = json.loads(answer.stdout)
    rows = {row["subject"]: row for row in told["checks"]}
    assert told["stack"] == versions.stack_in_use()
    assert rows["verl"]["found"] == "0.9.1" and {"memory", "disk, runs", "open files (ulimit -n)"} <= set(rows)
    assert answer.returncode == any(row["problem"] for row in rows.values())
