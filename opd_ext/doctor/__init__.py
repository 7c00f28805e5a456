# SPDX-License-Identifier: Apache-2.0
"""``opd doctor``: is this machine ready to train? Looks without starting Ray, vLLM or a GPU context.

verl reports a plugin that fails to load at DEBUG level only, and the run then fails much later with another
message; here the plugin is loaded in a fresh process, as every worker loads it, and its error is shown.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_ext.doctor.check import Check, needs
from opd_ext.doctor.devices import (
    Gpu,
    NoDriver,
    check_devices,
    check_driver,
    check_gpu_memory,
    check_nvcc,
    installed_gpus,
    usable,
)
from opd_ext.doctor.machine import check_disk, check_memory, check_open_files, check_sandbox, check_shared_memory
from opd_ext.doctor.network import check_communication, check_infiniband
from opd_ext.doctor.software import check_libraries, check_plugin, check_python, check_versions
from opd_ext.terminal import terminal
from opd_ext.versions import Stack, stack_in_use


def run_checks() -> list[Check]:
    stack = stack_in_use()
    gpus: list[Gpu] = []
    missing = "nvidia-smi lists none"
    try:
        gpus = installed_gpus()
    except NoDriver as error:
        missing = str(error)
    return [
        check_python(),
        *check_versions(stack),
        check_devices(stack, gpus, missing),
        *(check_gpu_stack(gpus) if stack == "gpu" else []),
        *check_libraries(stack),
        check_plugin(stack),
        *check_machine(stack, len(usable(gpus))),
    ]


def check_gpu_stack(gpus: list[Gpu]) -> list[Check]:
    return [
        *check_driver(gpus),
        *check_gpu_memory(usable(gpus)),
        check_nvcc(),
        check_infiniband(),
        check_communication(),
    ]


def check_machine(stack: Stack, gpus: int) -> list[Check]:
    needed = needs(stack, gpus)
    runs = Path(os.environ.get("OPD_RUNS") or "runs").absolute()
    ray_folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    ray_disk = needs("cpu", 0).disk  # logs and what the object store spills; checkpoints are among the runs
    return [
        check_memory(needed.memory),
        check_disk("disk, runs", runs, needed.disk, "free some space, or set OPD_RUNS to a folder elsewhere"),
        check_disk("disk, Ray", ray_folder, ray_disk, "free some space or set RAY_TMPDIR"),
        check_shared_memory(needed.shm),
        check_open_files(needed.files),
        check_sandbox(),
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


def tell_json(checks: Sequence[Check]) -> int:
    """The same as JSON, for a program: ``{"stack": ..., "checks": [{subject, found, wanted, problem}, ...]}``."""
    print(json.dumps({"stack": stack_in_use(), "checks": [asdict(check) for check in checks]}, indent=2))
    return 1 if any(check.problem for check in checks) else 0


def main(as_json: bool = False) -> int:
    """The command; returns its exit status."""
    if as_json:
        return tell_json(run_checks())
    console = terminal()
    with console.status("looking at this machine"):
        checks = run_checks()
    return tell(checks, console)
