# SPDX-License-Identifier: Apache-2.0
"""What ranks on several nodes speak through: InfiniBand, and the variables that NCCL and Gloo obey."""

import ctypes
import os
import resource
from collections import Counter
from pathlib import Path

from opd_ext.doctor.check import Check

SYS = Path("/sys/class")
DEV = Path("/dev/infiniband")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_")


def check_infiniband(sys: Path = SYS, dev: Path = DEV, library: str = "libibverbs.so.1") -> Check:
    """Adapters with an active port (RoCE ones included), and what keeps a process of this container from using them."""
    ports = Counter(_active_ports(sys / "infiniband"))
    if not ports:
        return Check("InfiniBand", "none: between nodes NCCL takes TCP", "for several nodes")
    found = "; ".join(f"{count} x {kind}" for kind, count in sorted(ports.items()))
    if os.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return Check("InfiniBand", f"{found}; switched off by NCCL_IB_DISABLE", "for several nodes")
    problem = None
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if not list(dev.glob("uverbs*")):
        problem = f"InfiniBand is here but {dev} is not, so NCCL falls back to TCP; give the container --device {dev}."
    elif not _loads(library):
        problem = (
            f"InfiniBand is here but {library} is not, so NCCL falls back to TCP; install it (Debian, Ubuntu: apt-get "
            "install libibverbs1 librdmacm1 ibverbs-providers)."
        )
    elif locked != resource.RLIM_INFINITY:
        problem = (
            f"A process may lock {locked // 1024} KiB of memory and InfiniBand needs as much as it transfers; set "
            "`ulimit -l unlimited` (--ulimit memlock=-1 of the container)."
        )
    return Check("InfiniBand", found, "for several nodes", problem)


def _active_ports(folder: Path) -> list[str]:
    """Rate and kind of every port that is up."""
    ports = [port for port in folder.glob("*/ports/*") if "ACTIVE" in _read(port / "state")]
    return [f"{_read(port / 'rate')} ({_read(port / 'link_layer')})" for port in ports]


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else "unknown"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_communication(sys: Path = SYS) -> Check:
    """Variables that are set, and those that name an interface or adapter that this machine does not have."""
    known = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    interfaces, adapters = _names(sys / "net"), _names(sys / "infiniband")
    problems = []
    for name, there in (
        ("NCCL_SOCKET_IFNAME", interfaces),
        ("GLOO_SOCKET_IFNAME", interfaces),
        ("NCCL_IB_HCA", adapters),
    ):
        wanted = known.get(name)
        if wanted and not _matches(wanted, there, exactly=name.startswith("GLOO")):
            listed = ", ".join(there) or "none"
            problems.append(f"{name}={wanted} names none of this machine's ({listed}); correct or unset it.")
    found = ", ".join(f"{name}={value}" for name, value in known.items())
    return Check("NCCL, Gloo", found or "no variables set", "", " ".join(problems) or None)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _matches(wanted: str, there: list[str], exactly: bool) -> bool:
    """NCCL's rule: a list of prefixes; ``=`` in front makes them whole names, ``^`` excludes them. Gloo wants names."""
    exclude = wanted.startswith("^")
    exactly = exactly or wanted.lstrip("^").startswith("=")
    named = [name.split(":")[0] for name in wanted.lstrip("^=").split(",")]
    hit = [name for name in there if (name in named if exactly else name.startswith(tuple(named)))]
    return len(hit) < len(there) if exclude else bool(hit)
