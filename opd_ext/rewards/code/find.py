# SPDX-License-Identifier: Apache-2.0
"""Which sandbox this machine has: bubblewrap, else the kernel's namespaces by hand, else none.

A sandbox counts when a program that tries its walls, started as any other, finds that they hold.
"""

import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from opd_ext.rewards.code.sandbox import PROCESSES, TEMPORARY, Job, Limits, Sandbox, SandboxError, interpreter

PACKAGES = ("numpy",)
"""What programs may import besides the standard library, where the grader's environment has it."""

_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
          "/dev/stderr": "/proc/self/fd/2"}  # fmt: skip

_PROBE = """
import json, os, signal, socket, sys
port, marker, processes = json.loads(input())
held = {}
try:
    socket.create_connection(("127.0.0.1", port), 1)
    held["the network can be reached"] = True
except OSError:
    pass
held["files of this machine can be read"] = os.path.exists(marker)
held["the environment can be read"] = bool(set(os.environ) - {"LC_CTYPE", "PWD", "OPENBLAS_NUM_THREADS"})
held["processes of this machine can be seen"] = os.getpid() > 8
try:
    os.close(os.open("/written", os.O_CREAT | os.O_WRONLY))
    held["the root can be written"] = True
except OSError:
    pass
for device in ("/dev/null", "/dev/urandom", "/dev/shm", "/tmp"):
    mode = os.R_OK | (os.W_OK | os.X_OK) * os.path.isdir(device)
    held[device + " cannot be used"] = not os.access(device, mode)
made = 0
try:
    while made <= processes:
        if not os.fork():
            signal.pause()
        made += 1
except OSError:
    pass
held["the number of processes has no limit"] = made > processes
print(json.dumps([name for name, value in held.items() if value]))
"""


def find_sandbox(allow_unsafe: bool = False) -> Sandbox:
    """The sandbox that programs are graded in.

    Args:
        allow_unsafe: where there is none, run programs with limits only, with this account's files and network.

    Raises:
        SandboxError: one sentence that says what was tried and what can be changed.
    """
    found, reasons = _found()
    if found is not None:
        return found
    if allow_unsafe:
        return Sandbox("no sandbox, as allow_unsafe=true allows", walls=False, paths=_packages()[0])
    raise SandboxError(
        f"This machine has no sandbox for programs that a model wrote ({'; '.join(reasons)}): install bubblewrap, "
        "allow namespaces (of a container: --security-opt seccomp=unconfined, or --cap-add SYS_ADMIN), or set "
        "sandbox_fusion_url or, where nothing can be harmed, allow_unsafe=true in "
        "reward.custom_reward_function.reward_kwargs (of a pipeline: reward.kwargs)."
    )


@cache
def _found() -> tuple[Sandbox | None, tuple[str, ...]]:
    reasons = [] if shutil.which("bwrap") else ["there is no bwrap"]
    for sandbox in candidates():
        if not (broken := faults(sandbox)):
            return sandbox, ()
        reasons.append(broken)
    return None, tuple(dict.fromkeys(reasons))


def candidates() -> Iterator[Sandbox]:
    """In order of preference. A container may forbid a /proc of one's own; then programs have none."""
    root = os.geteuid() == 0
    for proc in (True, False):
        if command := shutil.which("bwrap"):
            yield bubblewrap(command, root, proc)
    for as_root in (True, False) if root else (False,):
        for proc in (True, False):
            yield namespaces(as_root, proc)


def bubblewrap(command: str, root: bool, proc: bool) -> Sandbox:
    """``bwrap``. By root without a user namespace: so the program can become a user whose processes are counted."""
    paths, packages = _packages()
    folders, links = _library()
    words = [command, "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if root else ["--unshare-user", "--disable-userns"]
    shown, devices = [*folders, interpreter()], [*filter(os.path.exists, _DEVICES)]
    words += _above([*links, *shown, *devices, *TEMPORARY])
    for link, target in links.items():
        words += ["--symlink", target, link]
    words += _bound("--ro-bind", shown) + _bound("--dev-bind", devices)
    covered = _covered(folders)
    for folder in covered:
        words += ["--perms", "0755", "--size", str(64 << 10), "--tmpfs", folder]
    for folder in TEMPORARY:
        words += ["--perms", "1777", "--size", str(16 << 20), "--tmpfs", folder]
    words += _above(packages) + _bound("--ro-bind", packages)  # which may lie below what was covered
    words += [word for folder in covered for word in ("--remount-ro", folder)]
    if proc:
        words += ["--proc", "/proc", *(w for link, target in _LINKS.items() for w in ("--symlink", target, link))]
    words += ["--remount-ro", "/", "--chdir", "/tmp"]
    return Sandbox(f"bubblewrap{'' if proc else ', no /proc'}", tuple(words), root=root, paths=paths)


def namespaces(root: bool, proc: bool) -> Sandbox:
    """unshare(2) and mounts, by the interpreter that then becomes the program."""
    paths, packages = _packages()
    folders, links = _library()
    jail = {
        "root": root, "proc": proc, "folders": folders, "links": links | (_LINKS if proc else {}), "cwd": "/tmp",
        "packages": packages, "covered": dict.fromkeys(_covered(folders), "size=64k,nr_inodes=256,mode=755"),
        "devices": [device for device in _DEVICES if os.path.exists(device)], "empty": TEMPORARY,
    }  # fmt: skip
    return Sandbox(f"unshare{'' if proc else ', no /proc'}", jail=jail, root=root, paths=paths)


def _above(paths: list[str]) -> list[str]:
    """Words of bwrap for the folders that lead to paths: those that it makes unasked are closed to all but root."""
    above = {str(parent) for path in paths for parent in Path(path).parents} - {"/", *paths}
    return [word for folder in sorted(above) for word in ("--perms", "0755", "--dir", folder)]


def _bound(how: str, paths: list[str]) -> list[str]:
    return [word for path in paths for word in (how, path, path)]


def faults(sandbox: Sandbox) -> str:
    """Which wall of a sandbox does not hold, or why it does not start; nothing if all is well."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as marker:
        asked = json.dumps([server.getsockname()[1], marker.name, PROCESSES])
        try:
            outcome = sandbox.run(Job(_PROBE, asked, limits=Limits(seconds=20), filtered=False))
            broken = json.loads(outcome.output)
        except SandboxError as error:
            return str(error)
        except ValueError:
            return f"{sandbox.name}: {outcome.error or outcome.end}"
    return f"{sandbox.name}: {', '.join(broken)}" if broken else ""


def _library() -> tuple[list[str], dict[str, str]]:
    """Folders of the interpreter and of the C library, and links among them."""
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)}
    prefix = os.path.dirname(os.path.dirname(interpreter()))
    wanted = [path for path in _SYSTEM if os.path.isdir(path) and path not in links]
    wanted += [path for path in ("/nix/store",) if interpreter().startswith(path)]
    wanted += [path for path in (f"{prefix}/lib", f"{prefix}/lib64") if os.path.isdir(path)]
    folders: list[str] = []
    for path in wanted:
        if not any(Path(os.path.realpath(path)).is_relative_to(os.path.realpath(known)) for known in folders):
            folders.append(path)
    return folders, links


def _covered(folders: list[str]) -> list[str]:
    """Folders of installed packages below the library's: the grader itself may lie there, and what others wrote."""
    names = ("site-packages", "dist-packages")
    found = (path for folder in folders for name in names for path in Path(folder).glob(f"python*/{name}"))
    return sorted(str(path) for path in found if path.is_dir() and not path.is_symlink())


@cache
def _packages() -> tuple[tuple[str, ...], list[str]]:
    """Entries of the import path, and the folders that programs see of them."""
    paths: list[str] = []
    folders: list[str] = []
    for name in PACKAGES:
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            paths.append(os.path.dirname(folder))
            folders += [path for path in (folder, f"{folder}.libs") if os.path.isdir(path)]
    return tuple(dict.fromkeys(paths)), folders
