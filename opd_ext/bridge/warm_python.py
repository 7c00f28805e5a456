# SPDX-License-Identifier: Apache-2.0
"""A Python that starts warm: processes forked from one that has imported torch, transformers, vLLM and verl.

A run on one machine starts some ten Python processes, one waiting for the other, and nearly all of their start is the
same imports again. This module imports them once and answers under a path that is used like an interpreter: Ray runs
its workers with it (``runtime_env.py_executable``), multiprocessing its spawned children (``set_executable``).

Three roles:

* The *server* (:class:`WarmPython` starts it) imports what knows nothing of Ray, listens, and forks a *template* for
  every Ray job. Ray reads the job's identity from the environment when its library is loaded, never again; so a
  template imports Ray and verl for one job, and every process of that job is forked from it.
* A *stand-in* (:mod:`opd_ext.bridge.stand_in`) is what the path starts. It sends its command line, environment, folder
  and open files to the template, forwards signals to the process that was forked, and ends as that ends. What cannot
  be forked exactly (other flags, other settings of libraries, other modules of a name, no answer) it does itself, as a
  plain Python.
* The *forked process* becomes what was asked for: script or code, environment, folder, files, priority.

Nothing outlives its owner: a stand-in that is killed takes its process along, and so does the server's owner.
"""

# Standard library only: whoever starts a run imports this file first, and what is slow is imported behind a request.
import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping

from opd_ext.bridge import stand_in
from opd_ext.bridge.stand_in import kill, receive, send
from opd_ext.launch import PATH_VARIABLE

# Everything that takes long to import and does not import Ray.
PRELOADED = (
    "torch.distributed.fsdp",
    "tensordict",
    "pandas",
    "datasets",
    "transformers.modeling_utils",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "torch.utils.tensorboard",
    "math_verify",
    "fastapi",
    "vllm.config",
    "vllm.engine.arg_utils",
)

# The rest; of this package only what verl loads by itself, so that a run of stock verl is stock verl.
PRELOADED_FOR_A_JOB = (
    "ray",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
    "vllm.entrypoints.cli.serve",
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.v1.trainer_sync",
    "verl.trainer.ppo.v1.agent_loop_tq",
    "verl.workers.engine_workers",
    "verl.workers.engine.fsdp.transformer_impl",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "verl.workers.rollout.vllm_rollout.utils",
    "verl.experimental.reward_loop",
)

# Ray reads these when it is loaded: they tell its jobs apart.
JOB = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_AUTH_MODE")

# Libraries read variables with these beginnings when they are imported, so a process that wants other values of them
# cannot be forked.
READ_AT_IMPORT = ("VERL_PLATFORM", "VERL_USE_", "TQ_", "TORCHDYNAMO", "HF_", "PYTHONHASHSEED")

_GRACE_S = 3.0
_IDLE_S = 5.0  # after which a template whose processes have all ended ends too


# ---------------------------------------------------------------------- server and templates


class _Forking:
    """Forks for whoever asks at a socket, until standard input ends.

    Args:
        listener: the socket; stand-ins may come while the imports still go on.
        job: whose processes are forked here; None: of the server, which forks templates.
    """

    def __init__(self, listener: socket.socket, job: list[str] | None):
        self.listener, self.job = listener, job
        self.address: str = listener.getsockname()
        self.connections: dict[socket.socket, int] = {}  # of stand-ins, with the process of each
        self.templates: dict[str, int] = {}  # address: process

    def serve(self) -> tuple[dict, list[int]]:
        """Import, then fork for every request.

        Returns:
            In a forked process only: its request and its open files.
        """
        _preload(PRELOADED if self.job is None else PRELOADED_FOR_A_JOB)
        if self.job is None:
            open(_ready(self.address), "w").close()
        self.environment = _read_at_import(os.environ)
        self.woken, self.waker = socket.socketpair()
        for end in (self.woken, self.waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        used = False
        while True:
            watched = [0, self.listener, self.woken, *self.connections]
            idle = used and self.job is not None and not self.connections
            ready, _, _ = select.select(watched, [], [], _IDLE_S if idle else None)
            if idle and not ready:
                os._exit(0)
            if self.woken in ready:
                with contextlib.suppress(BlockingIOError):
                    while self.woken.recv(4096):
                        pass
                self.reap()
            for connection in [each for each in self.connections if each in ready]:
                kill(self.connections.pop(connection), signal.SIGKILL)  # its stand-in was killed
                connection.close()
            if 0 in ready and not os.read(0, 1):
                self.end()
            if self.listener in ready:
                forked = self.answer(*self.listener.accept())
                if forked is not None:
                    return forked
                used = True

    def answer(self, connection: socket.socket, _: object) -> tuple[dict, list[int]] | None:
        """Answer one stand-in; in a forked process, its request and files."""
        try:
            request, files = receive(connection)
        except (EOFError, OSError, ValueError):
            connection.close()
            return None
        job = [request["environment"].get(name, "") for name in JOB]
        wanted = _read_at_import(request["environment"])
        if wanted != self.environment:
            print("started cold, for it wants", wanted.items() ^ self.environment.items(), flush=True)
            answer: object = None
        elif self.job is None:
            answer, template = self.template(job)
            if template is not None:
                connection.close()
                for descriptor in files:
                    os.close(descriptor)
                return template.serve()
        elif shadowed := _shadowed(_first_on_path(request)):
            print("started cold, for it has its own", *shadowed, flush=True)
            answer = None
        else:
            answer = os.fork()
            if not answer:
                self.leave()
                connection.close()
                return request, files
            self.connections[connection] = answer
        with contextlib.suppress(OSError):
            send(connection, answer)
        for descriptor in files:
            os.close(descriptor)
        if connection not in self.connections:
            connection.close()
        return None

    def template(self, job: list[str]) -> tuple[str, "_Forking | None"]:
        """The address of a job's template, forked if it is not there; in the forked process, the template."""
        address = f"{self.address}-{'-'.join(job)}"
        if address not in self.templates:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(address)
            new = _Forking(_listen(address), job)
            pid = os.fork()
            if not pid:
                self.leave()
                os.environ.update(zip(JOB, job, strict=True))
                return address, new
            new.listener.close()
            self.templates[address] = pid
        return address, None

    def leave(self) -> None:
        """In a forked process: close what belongs to the process that it was forked from."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self.listener, self.waker, self.woken, *self.connections):
            end.close()

    def reap(self) -> None:
        """Tell the stand-ins of ended processes how they ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self.templates = {address: each for address, each in self.templates.items() if each != pid}
            for connection in [each for each, process in self.connections.items() if process == pid]:
                with contextlib.suppress(OSError):
                    send(connection, os.waitstatus_to_exitcode(status))
                connection.close()
                del self.connections[connection]

    def end(self) -> None:
        """The owner is gone: give what was forked some seconds to notice, then kill it. Never returns."""
        import shutil
        import time

        self.listener.close()
        until = time.monotonic() + (2 * _GRACE_S if self.job is None else _GRACE_S)
        while (self.connections or self.templates) and time.monotonic() < until:
            self.reap()
            time.sleep(0.02)
        for pid in (*self.connections.values(), *self.templates.values()):
            kill(pid, signal.SIGKILL)
        if self.job is None:
            shutil.rmtree(os.path.dirname(self.address), ignore_errors=True)
        os._exit(0)


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    return listener


def _preload(modules: tuple[str, ...]) -> None:
    """Import ``modules``; none of them may start a thread that a fork would lose."""
    import gc
    import importlib

    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every page that forked processes share


def _ready(address: str) -> str:
    """The file that is there once the server listens and may have children."""
    return f"{address}.ready"


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _first_on_path(request: dict) -> list[str]:
    """The folders where a Python looks for modules before all others."""
    program, path = request["program"][0], request["environment"].get("PYTHONPATH", "")
    own = request["folder"] if program in ("-c", "-m") else os.path.dirname(os.path.join(request["folder"], program))
    return [own, *filter(None, path.split(os.pathsep))]


def _shadowed(folders: list[str]) -> list[str]:
    """Modules that are imported here and would be others, found in ``folders``: a copy of this package, say."""
    names = []
    for folder in folders:
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder):
                name, ending = os.path.splitext(entry)
                path = os.path.join(folder, entry, "" if ending else "__init__.py").rstrip("/")
                known = getattr(sys.modules.get(name), "__file__", None)
                if known and ending in ("", ".py") and os.path.isfile(path) and not os.path.samefile(known, path):
                    names.append(name)
    return names


# ---------------------------------------------------------------------- the forked process


def _become(request: dict, received: list[int]) -> None:
    """Turn this forked process into what was asked for and run it to its end."""
    import multiprocessing
    import random
    import runpy
    import types

    import numpy
    import torch
    from ray._raylet import Config

    # A group of its own: Ray kills the group of a worker that has ended, and this one would be in the server's.
    os.setpgid(0, 0)
    _take_files(received, request["files"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.setpriority(os.PRIO_PROCESS, 0, max(request["niceness"], os.getpriority(os.PRIO_PROCESS, 0)))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    # What every interpreter draws or reads anew at its start.
    random.seed()
    numpy.random.seed()
    Config.initialize("")  # Ray's RAY_* settings
    if threads := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]:
        torch.set_num_threads(int(threads))
    if path := os.environ.get(PATH_VARIABLE):
        multiprocessing.set_executable(path)
    kind, *rest = request["program"]
    sys.path[:0] = _first_on_path(request)
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def _take_files(received: list[int], wanted: list[int]) -> None:
    """Give the received open files the numbers that the stand-in had for them."""
    import fcntl

    above = max((*wanted, *received, 2)) + 1  # the two sets of numbers may overlap
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, above) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for source, target in zip(moved, wanted, strict=True):
        os.dup2(source, target, inheritable=target <= 2)
        os.close(source)


# ---------------------------------------------------------------------- the owner


class WarmPython:
    """Starts the server; ``path`` is used like an interpreter until :meth:`close`, or the end of this process.

    Args:
        environment: the server's; forked processes have their own, but see ``READ_AT_IMPORT``.
    """

    def __init__(self, environment: Mapping[str, str]):
        import shlex
        import subprocess
        import tempfile

        self._folder = tempfile.TemporaryDirectory(prefix="opd-warm-", ignore_cleanup_errors=True)
        self._address = address = os.path.join(self._folder.name, "socket")
        self.path = os.path.join(self._folder.name, "python")
        words = [sys.executable, "-I", "-S", stand_in.__file__, address]
        with open(self.path, "w") as file:
            file.write(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        os.chmod(self.path, 0o755)
        # The socket is there before anybody can ask; the server inherits it.
        with _listen(address) as listener, open(os.path.join(self._folder.name, "server.log"), "w") as log:
            self._server = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), str(listener.fileno())],
                pass_fds=[listener.fileno()],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server and what is left of its children."""
        self._server.stdin.close()
        if not os.path.exists(_ready(self._address)):  # it would hear of it when its imports are done
            self._server.kill()
        self._server.wait(4 * _GRACE_S)
        self._folder.cleanup()

    def __enter__(self) -> "WarmPython":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def warm_python(wanted: bool, settings: Mapping[str, str]) -> Iterator[None]:
    """``PATH_VARIABLE`` names a warm Python while the block runs.

    One that it names already is used as it is. Nothing is started for a cluster, which has machines of its own.

    Args:
        wanted: False starts none.
        settings: environment variables of the processes to come, besides those of this one.
    """
    if not wanted or os.environ.get(PATH_VARIABLE) or os.environ.get("RAY_ADDRESS"):
        yield
        return
    with WarmPython({**os.environ, **settings}) as python:
        os.environ[PATH_VARIABLE] = python.path
        try:
            yield
        finally:
            del os.environ[PATH_VARIABLE]


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, which no module must be imported from
    _become(*_Forking(socket.socket(fileno=int(sys.argv[1])), None).serve())
