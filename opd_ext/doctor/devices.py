# SPDX-License-Identifier: Apache-2.0
"""GPUs and their driver, as ``nvidia-smi`` tells them, and the compiler of CUDA."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from packaging.version import Version

from opd_ext.doctor.check import Check
from opd_ext.versions import Stack

MIN_DRIVER = "580.65.06"  # of CUDA 13, which torch's and vLLM's wheels bring (CUDA's release notes, table of drivers)
QUERY = ("name", "memory.total", "memory.used", "driver_version")
MIB_IN_USE = 1024  # more than a driver and a desktop take; another process's model


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB, NaN where the driver does not say (MIG)."""

    name: str
    total: float
    used: float
    driver: str


class NoDriver(RuntimeError):
    """No driver answers; the message is the driver's own, or says that there is no `nvidia-smi`."""


def installed_gpus() -> list[Gpu]:
    """What the driver lists, in its order.

    Raises:
        NoDriver: no `nvidia-smi`, or it fails.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        raise NoDriver("there is no nvidia-smi")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise NoDriver("nvidia-smi does not answer within 60 s") from None
    if answer.returncode != 0:
        said = (answer.stdout + answer.stderr).strip().split("\n")[0]
        raise NoDriver(said or f"nvidia-smi ends with exit status {answer.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.split("\n") if line.strip()]
    return [Gpu(name, _mib(total), _mib(used), driver) for name, total, used, driver in rows]


def _mib(cell: str) -> float:
    return float(cell) if re.fullmatch(r"\d+(\.\d+)?", cell) else float("nan")


def usable(gpus: list[Gpu]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves: as CUDA reads it, a number that does not exist ends the list."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return gpus
    wanted = [name.strip() for name in named.split(",")]
    if wanted[0].startswith(("GPU-", "MIG-")):  # by UUID: one each, of the same kind
        return gpus[: len(wanted)]
    left = []
    for name in wanted:
        if not name.isdigit() or int(name) >= len(gpus):
            break
        left.append(gpus[int(name)])
    return left


def check_devices(stack: Stack, gpus: list[Gpu], missing: str = "nvidia-smi lists none") -> Check:
    """The devices of a run; ``missing`` says why there is no GPU."""
    cores = f"CPU, {len(os.sched_getaffinity(0))} cores"
    if stack == "gpu" and not gpus:
        problem = f"The GPU stack is installed and no GPU answers ({missing}); check the driver and `--gpus all`."
        return Check("devices", cores, "GPU", problem)
    kinds = [_kind(gpu) for gpu in gpus]
    counted = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    left = usable(gpus)
    if gpus and stack == "cpu":
        counted.append("GPUs unused: this is the CPU stack")
    elif len(left) < len(gpus):
        counted.append(f"{len(left)} by CUDA_VISIBLE_DEVICES")
    problem = None
    if stack == "gpu" and not left:
        named = os.environ["CUDA_VISIBLE_DEVICES"]
        problem = f"CUDA_VISIBLE_DEVICES={named!r} leaves none of {len(gpus)} GPUs; unset it, or name some."
    return Check("devices", "; ".join([*counted, cores]), "GPU" if stack == "gpu" else "", problem)


def _kind(gpu: Gpu) -> str:
    return gpu.name if gpu.total != gpu.total else f"{gpu.name}, {gpu.total / 1024:.0f} GiB"


def check_driver(gpus: list[Gpu]) -> list[Check]:
    """The driver's version; no row without a driver."""
    if not gpus:
        return []
    found = gpus[0].driver
    problem = f"The NVIDIA driver is {found} and torch's CUDA 13 build needs {MIN_DRIVER} or newer; update it."
    return [Check("driver", found, f">= {MIN_DRIVER}", problem if Version(found) < Version(MIN_DRIVER) else None)]


def check_gpu_memory(gpus: list[Gpu]) -> list[Check]:
    """Nothing else may hold the memory that the recipes give to training and generation by turns."""
    known = [gpu for gpu in gpus if gpu.used == gpu.used]
    if not known:
        return []
    most = max(known, key=lambda gpu: gpu.used)
    taken = [gpu for gpu in known if gpu.used > MIB_IN_USE]
    problem = (
        f"{len(taken)} of {len(gpus)} GPUs hold memory of other processes, up to {most.used / 1024:.0f} GiB; stop them "
        "(`nvidia-smi` lists them), or name free GPUs in CUDA_VISIBLE_DEVICES."
    )
    found = f"at most {most.used / 1024:.1f} GiB of a GPU in use"
    return [Check("GPU memory", found, f"<= {MIB_IN_USE / 1024:.0f} GiB in use", problem if taken else None)]


def check_nvcc() -> Check:
    """Compiles flash-attn where there is no wheel of it; nothing at run time asks for it."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return Check("nvcc", "none", "only to compile flash-attn")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout
    release = re.search(r"release ([\d.]+)", said)
    return Check("nvcc", f"{release[1] if release else 'of unknown version'}, {nvcc}", "only to compile flash-attn")
