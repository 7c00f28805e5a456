# SPDX-License-Identifier: Apache-2.0
"""What every benchmark here needs: clocks, the kernel's memory marks, fresh processes, the machine's name, a file."""

import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().split("\n"):
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; CPU memory is measured on Linux only.")


def reset_resident_peak() -> None:
    """Set ``VmHWM`` back to ``VmRSS``."""
    Path("/proc/self/clear_refs").write_text("5")


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, the accelerator's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_fresh_process(function: Callable, *args: object, environment: Mapping[str, str] | None = None) -> object:
    """``function(*args)`` in a new process, so that nothing allocated before is in its marks."""
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def provenance(device: str, date: str, *packages: str) -> dict:
    """When (today if ``date`` is empty), on what, and with which versions of torch and ``packages``."""
    versions = {name: metadata.version(name) for name in ("torch", *packages)}
    return {"date": date or datetime.date.today().isoformat(), "hardware": _hardware(device), **versions}


def _hardware(device: str) -> dict:
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        return {"name": torch.cuda.get_device_name(), "driver": driver}
    lines = Path("/proc/cpuinfo").read_text().split("\n")
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    load = round(os.getloadavg()[0], 1)  # above the threads of this benchmark, others were at work too
    return {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": load}


def write_json(path: Path, result: dict) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)
