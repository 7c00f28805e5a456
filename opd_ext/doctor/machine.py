# SPDX-License-Identifier: Apache-2.0
"""Memory, disks, shared memory and the limits of a process."""

import resource
import shutil
from pathlib import Path

import psutil

from opd_ext.doctor.check import GIB, Check
from opd_ext.rewards.code import SandboxError, check_machine

MAX_DISK_USE = 0.95  # Ray refuses tasks on a fuller disk


def check_memory(needed: float) -> Check:
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    found, wanted = f"{free:.1f} of {memory.total / GIB:.1f} GiB free", f">= {needed:.0f} GiB"
    problem = f"Only {found} and a run needs {wanted}; stop other processes."
    return Check("memory", found, wanted, problem if free < needed else None)


def check_disk(subject: str, path: Path, needed: float, remedy: str) -> Check:
    """``path`` need not exist yet: its nearest parent that does is on the same disk."""
    path = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(path)
    free = usage.free / GIB
    if free < needed:
        problem = f"{path} has {free:.1f} GiB free and a run needs {needed:.0f}; {remedy}."
    elif usage.used / usage.total > MAX_DISK_USE:
        problem = f"The disk of {path} is over {MAX_DISK_USE:.0%} full and Ray refuses to work there; {remedy}."
    else:
        problem = None
    return Check(subject, f"{free:.1f} GiB free in {path}", f">= {needed:.0f} GiB", problem)


def check_shared_memory(needed: float, path: Path = Path("/dev/shm")) -> Check:
    wanted = f">= {needed:.0f} GiB"
    if not path.is_dir():
        return Check("shared memory", "missing", wanted, f"{path} does not exist; mount a tmpfs there.")
    size = shutil.disk_usage(path).total / GIB
    found = f"{size:.2f} GiB in {path}"
    problem = (
        f"Shared memory: {found}, needed {wanted}; give the container --shm-size={needed:.0f}g (or --ipc=host), or "
        f"remount {path}."
    )
    return Check("shared memory", found, wanted, problem if size < needed else None)


def check_sandbox() -> Check:
    """What programs of a model would be graded in; no problem of a machine that grades none."""
    try:
        found = check_machine()
    except SandboxError as error:
        found = f"none {str(error)[str(error).index('(') : str(error).index(')') + 1]}"
    return Check("sandbox of graded programs", found, "only where programs are graded")


def check_open_files(needed: int) -> Check:
    """The hard limit, up to which Ray raises the other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft}, up to {'any number' if hard == resource.RLIM_INFINITY else hard}"
    problem = (
        f"A process may open {hard} files and Ray needs {needed}; raise the limit (`ulimit -Hn`, "
        f"/etc/security/limits.conf, or --ulimit nofile={needed} of the container)."
    )
    few = hard != resource.RLIM_INFINITY and hard < needed
    return Check("open files (ulimit -n)", found, f">= {needed}", problem if few else None)
