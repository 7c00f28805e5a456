# SPDX-License-Identifier: Apache-2.0
"""One program, one input, one fresh interpreter in a sandbox; the parent keeps the clock and what is expected.

Standard input, standard output, the job and the report are files in memory: nothing is written to a disk, and no pipe
can fill. A process group of its own would not do, since a program can leave it: it is the pid namespace that is killed.
"""

import json
import marshal
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from opd_ext.rewards.code import inside
from opd_ext.rewards.code.slots import slot
from opd_ext.rewards.code.syscalls import filter_of_this_machine

WALL = 2.0
"""Seconds on the clock per second of CPU time that a test may take: other processes want the cores, too."""

START_SECONDS = 60.0
"""Limit for the interpreter's start, which is no time of the program's."""

FORBIDDEN = "the program asked for another process, for the network or for something else that is not allowed here"
PROCESSES, OPEN_FILES = 64, 64
FILE_BYTES = 32 << 20  # of a file that a program writes, its output among them
FILES = 1024  # in each of the following folders
TEMPORARY = dict.fromkeys(("/tmp", "/dev/shm"), f"size=16m,nr_inodes={FILES},mode=1777")

_LOOK_SECONDS = 0.02  # between two looks at the memory of all processes of a program
_ERROR_BYTES = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")
_START = "import sys,marshal;c,j=marshal.load(open(int(sys.argv[1]),'rb'));exec(c);main(j)"
_RECURSION = 600_000  # LiveCodeBench's, so that programs that rely on it run


class SandboxError(RuntimeError):
    """A test could not be run at all, which says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What one test may use."""

    seconds: float = 6.0  # of CPU time
    memory_bytes: int = 1 << 30  # address space of a process, and memory of all processes together

    def of_process(self) -> dict[str, int]:
        """Names and values for ``setrlimit``."""
        cpu, stack = math.ceil(self.seconds), min(256 << 20, self.memory_bytes // 2)
        return {
            "RLIMIT_CPU": cpu, "RLIMIT_AS": self.memory_bytes, "RLIMIT_NPROC": PROCESSES, "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": FILE_BYTES, "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_STACK": stack, "RLIMIT_MEMLOCK": 0,
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A program and one input: text for standard input, the arguments of a function, or a ``check``.

    A check is Python behind the program, in its process; ``prelude`` is Python before it.
    """

    program: str
    stdin: str = ""
    function: str | None = None
    arguments: tuple = ()
    names: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    check: str = ""
    prelude: str = ""
    filtered: bool = True  # by the system calls that it makes; the other walls are tried without


@dataclass(frozen=True)
class Outcome:
    """What became of a test.

    Attributes:
        end: ``finished``, ``error`` (an exception, or a signal), ``time``, ``memory`` or ``output`` (too much of it).
        output: standard output.
        result: of a function, as JSON; None if there is none.
        error, frames: the exception in words, and where in the program, innermost first.
        missing: the name that a ``NameError`` is about.
        seconds: on the clock, without the interpreter's start.
    """

    end: str
    output: str = ""
    result: str | None = None
    error: str = ""
    frames: tuple[str, ...] = ()
    missing: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs.

    Attributes:
        name: as `opd doctor` shows it.
        command: what is put before the interpreter.
        jail: what :mod:`inside` builds its walls of; None where ``command`` builds them, or nobody does.
        root: started by root: the program becomes a user that has no other process.
        walls: False for no sandbox at all, only limits.
    """

    name: str
    command: tuple[str, ...] = ()
    jail: Mapping[str, Any] | None = None
    root: bool = False
    walls: bool = True
    paths: tuple[str, ...] = ()

    def run(self, job: Job) -> Outcome:
        """Run one test.

        Raises:
            SandboxError: the interpreter did not start, so that nothing is known about the program.
        """
        with slot() as number, _files() as files:
            ready, told = os.pipe()
            try:
                described = {
                    "program": job.program, "function": job.function, "arguments": list(job.arguments),
                    "check": job.check, "prelude": job.prelude,
                    "names": dict(job.names), "paths": list(self.paths), "recursion": _RECURSION,
                    "limits": job.limits.of_process(), "jail": self.jail and dict(self.jail), "ready": told,
                    "filter": filter_of_this_machine() if job.filtered else b"",
                    "uid": _nobody(number) if self.root else 0, "report": files["report"],
                }  # fmt: skip
                _fill(files["job"], marshal.dumps((_inside(), described)))
                _fill(files["stdin"], job.stdin.encode("utf-8", "surrogatepass"))
                process = subprocess.Popen(
                    [*self.command, interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", _START, str(files["job"])],
                    stdin=files["stdin"], stdout=files["stdout"], stderr=files["stderr"], cwd="/",
                    env={"OPENBLAS_NUM_THREADS": "1"} if "numpy" in job.program + job.check else {},
                    pass_fds=(files["job"], files["report"], told), start_new_session=not self.walls,
                )  # fmt: skip
                os.close(told)
                told = -1
                end, seconds = self._watch(process, ready, job.limits)
            finally:
                os.close(ready)
                if told >= 0:
                    os.close(told)
            if end == "start":
                said = _text(files["stderr"], _ERROR_BYTES).strip().split("\n")[-1]
                raise SandboxError(f"{self.name}: {said or f'exit status {process.returncode}'}")
            return _outcome(end, process.returncode, seconds, files, job.limits)

    def _watch(self, process: subprocess.Popen, ready: int, limits: Limits) -> tuple[str, float]:
        """Wait for the end, or bring it about; ``start`` if the program never began."""
        poll, end, folders = select.poll(), "", list[int]()
        handle = os.pidfd_open(process.pid)
        try:
            poll.register(ready, select.POLLIN)
            poll.register(handle, select.POLLIN)
            poll.poll(1000 * START_SECONDS)
            began, started = time.monotonic(), bool(select.select([ready], [], [], 0)[0] and os.read(ready, 1))
            poll.unregister(ready)
            if started and self.command:  # where it is one of ours, the kernel counts the files
                folders = _folders(process)
            while started and not poll.poll(1000 * _LOOK_SECONDS):
                if time.monotonic() - began > WALL * limits.seconds:
                    end = "time"
                elif memory(process.pid) > limits.memory_bytes or _too_many_files(folders):
                    end = "memory"
                if end:
                    break
            seconds = time.monotonic() - began
            with suppress(ProcessLookupError):
                if self.walls:
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not end and _too_many_files(folders):
                end = "memory"
            if started:  # all of the namespace is gone when nobody holds the pipe any more
                poll.register(ready, 0)
                poll.unregister(handle)
                poll.poll(2000)
        finally:
            for open_file in (handle, *folders):
                os.close(open_file)
        return end if started else "start", seconds


def interpreter() -> str:
    """The interpreter that this one's environment was made from: fresh, without the packages of an environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def memory(pid: int) -> int:
    """Bytes of memory that a process and all that descend from it hold, files they map not counted."""
    total, waiting = 0, [pid]
    while waiting:
        folder = f"/proc/{waiting.pop()}"
        try:
            resident, shared = map(int, Path(folder, "statm").read_bytes().split()[1:3])
            for thread in os.listdir(f"{folder}/task"):
                waiting += map(int, Path(folder, "task", thread, "children").read_bytes().split())
        except (OSError, ValueError):  # gone meanwhile
            continue
        total += (resident - shared) * _PAGE
    return total


def _folders(process: subprocess.Popen) -> list[int]:
    """The folders in memory that bwrap gave its program, which stay to be counted when it has ended; none if it has.

    Raises:
        SandboxError: this account may not look into them; the process has been ended.
    """
    found, pid = list[int](), process.pid
    try:
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        for path in TEMPORARY:
            found.append(os.open(f"/proc/{child}/root{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except PermissionError as error:
        if not os.path.exists(f"/proc/{child}"):  # the kernel says the same of one that has just gone
            return found
        process.kill()
        process.wait()
        raise SandboxError(f"bubblewrap: the files of a program cannot be counted ({error.strerror})") from None
    except (OSError, IndexError):
        pass
    return found


def _too_many_files(folders: list[int]) -> bool:
    """bwrap limits the size of a folder in memory and not the number of its files, each of which takes a kilobyte."""
    held = [os.fstatvfs(folder) for folder in folders]
    return any(each.f_files - each.f_ffree > FILES for each in held)


@cache
def _inside() -> Any:
    return compile(Path(inside.__file__).read_text(), "inside.py", "exec")


def _nobody(number: int) -> int:
    """A user id of no account and of no other test that runs at this time."""
    return 1_000_000_000 + number


@contextmanager
def _files() -> Iterator[dict[str, int]]:
    files: dict[str, int] = {}
    try:
        for name in ("stdin", "stdout", "stderr", "job", "report"):
            files[name] = os.memfd_create(name)
        yield files
    finally:
        for handle in files.values():
            os.close(handle)


def _fill(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.lseek(handle, 0, os.SEEK_SET)


def _text(handle: int, limit: int) -> str:
    return os.pread(handle, limit, 0).decode("utf-8", "replace")


def _outcome(end: str, status: int, seconds: float, files: Mapping[str, int], limits: Limits) -> Outcome:
    """What the parent makes of what a program left behind; nothing in it is believed."""
    if os.fstat(files["stdout"]).st_size >= FILE_BYTES:
        return Outcome("output", seconds=seconds)
    output = _text(files["stdout"], FILE_BYTES)
    if end:
        return Outcome(end, output, seconds=seconds)
    told = report(_text(files["report"], FILE_BYTES))
    if told.get("error"):
        over = told["error"].partition(":")[0] == "MemoryError"
        return Outcome("memory" if over else "error", output, seconds=seconds, **told)
    number = status - 128 if status > 128 else -status if status < 0 else 0
    if number == signal.SIGKILL and seconds >= 0.9 * limits.seconds or number == signal.SIGXCPU:
        return Outcome("time", output, seconds=seconds)
    if number == signal.SIGSYS:
        return Outcome("error", output, error=FORBIDDEN, seconds=seconds)
    if number:
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return Outcome("error", output, error=f"the process was ended by {name}", seconds=seconds)
    return Outcome("finished", output, seconds=seconds, **told)


def report(text: str) -> dict[str, Any]:
    """The fields of an :class:`Outcome` that a program, or what runs it, has reported; odd ones are dropped."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    if "result" in found:
        return {"result": text}
    error, frames, name = found.get("error"), found.get("frames"), found.get("name")
    frames = frames if isinstance(frames, list) else []
    return {
        "error": error if isinstance(error, str) else "",
        "frames": tuple(str(frame) for frame in frames[: inside.FRAMES] if isinstance(frame, str)),
        "missing": name if isinstance(name, str) else "",
    }
