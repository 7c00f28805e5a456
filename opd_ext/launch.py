# SPDX-License-Identifier: Apache-2.0
"""Processes that sample and train: started together, watched together, and never left behind.

Locally they are children of the pipeline, each with its own devices. Inside a Ray job or with ``RAY_ADDRESS`` set they
run as Ray tasks, on whatever nodes have the devices free: one task per command, or one per node of a group that
spans several. All nodes must see the same file system.
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
    nodes: int = 1  # that share the ranks, alike


@dataclass(frozen=True)
class Group:
    """The part of a torch.distributed group that runs on one node.

    Attributes:
        first, count: its ranks.
        address, port: where rank 0 waits for the others.
    """

    first: int
    count: int
    address: str
    port: int


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
    if wide := next((command for command in commands if command.nodes > 1), None):
        raise LaunchError(
            f"{wide.nodes} nodes are wanted, and without a Ray cluster there is this one: submit the pipeline as a Ray "
            "job (recipes/ray/submit.sh), set RAY_ADDRESS, or set train.nodes=1."
        )
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


def start_ranks(command: Command, devices: Sequence[str], group: Group | None = None) -> list[subprocess.Popen]:
    """Start the processes of one command, those of ``group`` or all; they die with this one."""
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    group = group or Group(0, max(1, command.ranks), "127.0.0.1", _free_port())
    joined = {"WORLD_SIZE": str(command.ranks), "MASTER_ADDR": group.address, "MASTER_PORT": str(group.port)}
    joined["LOCAL_WORLD_SIZE"] = str(group.count)
    children = []
    for local in range(group.count):
        own = joined | {"RANK": str(group.first + local), "LOCAL_RANK": str(local)} if command.ranks else {}
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
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(ignore_reinit_error=True, log_to_driver=False)

    @ray.remote(max_retries=0)
    def here(command: Command, group: Group | None) -> None:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device == "cuda" else []
        children = [(command, child) for child in start_ranks(command, devices, group)]
        try:
            _wait(children, lambda: None)
        finally:
            _stop([child for _, child in children])

    @ray.remote(max_retries=0)
    def meeting_place() -> tuple[str, int]:
        return ray.util.get_node_ip_address(), _free_port()

    def wanted(command: Command) -> dict[str, int]:
        """Of each of its nodes."""
        gpus = command.devices // command.nodes if device == "cuda" else 0
        return {"GPU": gpus, "CPU": max(1, command.ranks // command.nodes)}

    _check_cluster(commands, wanted, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    pending, held = [], []
    try:
        for command in commands:
            own = wanted(command)
            options = {"num_gpus": own["GPU"], "num_cpus": own["CPU"]}
            if command.nodes == 1:
                pending.append(here.options(**options).remote(command, None))
                continue
            bundle = {name: amount for name, amount in own.items() if amount}
            places = placement_group([bundle] * command.nodes, strategy="STRICT_SPREAD")
            held.append(places)
            at = [PlacementGroupSchedulingStrategy(places, index) for index in range(command.nodes)]
            address, port = ray.get(meeting_place.options(num_cpus=1, scheduling_strategy=at[0]).remote())
            share = command.ranks // command.nodes
            for index, place in enumerate(at):
                group = Group(index * share, share, address, port)
                pending.append(here.options(**options, scheduling_strategy=place).remote(command, group))
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
        for places in held:
            remove_placement_group(places)


def _check_cluster(
    commands: Sequence[Command], wanted: Callable[[Command], dict[str, int]], nodes: Sequence[dict[str, float]]
) -> None:
    """Refuse what would wait forever for devices that no node has.

    Args:
        nodes: resources of every node that is alive.

    Raises:
        LaunchError: one sentence.
    """
    gpus = sum(command.nodes * wanted(command)["GPU"] for command in commands)
    there = sum(node.get("GPU", 0) for node in nodes)
    if gpus > there:
        raise LaunchError(f"{gpus} GPUs are wanted, the Ray cluster has {there:g}; lower vllm.replicas or train.ranks.")
    for command in commands:
        own = wanted(command)
        fitting = [node for node in nodes if all(node.get(name, 0) >= amount for name, amount in own.items())]
        if len(fitting) < command.nodes:
            sizes = ", ".join(f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} CPUs" for node in nodes)
            raise LaunchError(
                f"{command.nodes} node(s) of {own['GPU']} GPUs and {own['CPU']} CPUs are wanted, and the Ray cluster's "
                f"nodes have {sizes}: set train.nodes to as many as share train.ranks, or lower train.ranks or "
                "vllm.tensor_parallel_size."
            )
