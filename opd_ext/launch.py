# SPDX-License-Identifier: Apache-2.0
"""Processes that sample and train: started together, watched together, and never left behind.

Locally they are children of the pipeline, each with its own devices. Inside a Ray job or with ``RAY_ADDRESS`` set they
run as one Ray task each, on whatever node has the devices free; all nodes must see the same file system.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATH_VARIABLE = "OPD_WARM_PYTHON"
"""Environment variable with the path of a warm Python that runs on this machine use."""

LOG_LINES = 15
POLL_S = 0.2


class LaunchError(RuntimeError):
    """A process failed; the message ends with the end of its log."""


@dataclass
class Command:
    """A Python module with arguments."""

    module: str
    args: list[str]
    log: Path
    devices: int = 1  # accelerators
    ranks: int = 0  # processes of one torch.distributed group; 0: one process that knows of no group
    environment: dict[str, str] = field(default_factory=dict)


def run(commands: Sequence[Command], device: str, watch: Callable[[], None] = lambda: None) -> None:
    """Run all commands at the same time until all have ended.

    Args:
        device: "cuda": local commands get disjoint devices; "cpu": they share the cores.
        watch: called a few times per second meanwhile.

    Raises:
        LaunchError: the first that fails ends all others.
    """
    if os.environ.get("RAY_ADDRESS"):
        _run_on_ray(commands, device, watch)
        return
    first, children = 0, []
    visible = _visible_devices() if device == "cuda" else []
    try:
        for command in commands:
            own = visible[first : first + command.devices]
            if device == "cuda" and len(own) < command.devices:
                raise LaunchError(f"{sum(c.devices for c in commands)} GPUs are wanted, {len(visible)} are visible.")
            first += command.devices
            children += [(command, child) for child in start_ranks(command, own)]
        _wait(children, watch)
    finally:
        _stop([child for _, child in children])
    watch()


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def start_ranks(command: Command, devices: Sequence[str]) -> list[subprocess.Popen]:
    """Start the processes of one command; they die with this one."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    group = {"WORLD_SIZE": str(command.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(max(1, command.ranks)):
        own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if command.ranks else {}
        with command.log.open("a") as log:
            children.append(
                subprocess.Popen(
                    [os.environ.get(PATH_VARIABLE, sys.executable), "-m", command.module, *command.args],
                    env=environment | own,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    preexec_fn=_die_with_parent,
                )
            )
    return children


def _die_with_parent() -> None:
    """A pipeline that is killed must not leave a trainer behind that writes what its successor writes too (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(children: list[tuple[Command, subprocess.Popen]], watch: Callable[[], None]) -> None:
    while True:
        states = [child.poll() for _, child in children]
        for (command, _), state in zip(children, states, strict=True):
            if state not in (None, 0):
                raise LaunchError(
                    f"{command.module} ended with status {state}; the end of {command.log}:\n{_tail(command.log)}"
                )
        if None not in states:
            return
        watch()
        time.sleep(POLL_S)


def _stop(children: list[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()


def _tail(log: Path) -> str:
    # Libraries that end with the interpreter complain on their way out; what failed stands before that.
    lines = log.read_text(errors="replace").strip().split("\n")
    return "\n".join([line for line in lines if not line.startswith((" - leaked", "nanobind"))][-LOG_LINES:])


def _run_on_ray(commands: Sequence[Command], device: str, watch: Callable[[], None]) -> None:
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False)

    @ray.remote(max_retries=0)
    def here(command: Command) -> None:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device == "cuda" else []
        children = [(command, child) for child in start_ranks(command, devices)]
        try:
            _wait(children, lambda: None)
        finally:
            _stop([child for _, child in children])

    gpus = (lambda command: command.devices) if device == "cuda" else (lambda command: 0)
    wanted, there = sum(map(gpus, commands)), ray.cluster_resources().get("GPU", 0)
    if wanted > there:
        raise LaunchError(
            f"{wanted} GPUs are wanted, the Ray cluster has {there:g}; lower vllm.replicas or train.ranks."
        )
    pending = [
        here.options(num_gpus=gpus(command), num_cpus=max(1, command.ranks)).remote(command) for command in commands
    ]
    try:
        while pending:
            done, pending = ray.wait(pending, timeout=1.0)
            ray.get(done)
            watch()
    except ray.exceptions.RayTaskError as error:
        raise LaunchError(str(error.cause)) from None
    except ray.exceptions.RayError as error:
        raise LaunchError(f"Ray lost a process: {' '.join(str(error).split())}") from None
    finally:
        for task in pending:
            ray.cancel(task, force=True)
