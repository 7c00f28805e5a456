# SPDX-License-Identifier: Apache-2.0
"""What a run needs of the machine: a folder to write to, room for checkpoints, devices, loggers."""

import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from opd_ext.bridge.sources import loggers
from opd_ext.config.devices import check_bookkeeping, check_visible, pools
from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError, did_you_mean
from opd_ext.plan.disk import checkpoint_bytes, on_disk
from opd_ext.plan.run import Run
from opd_ext.preflight.findings import Findings, refuse

GiB = 2**30
CORES_PER_RANK = 3  # what verl asks Ray for, per rank of a resource pool


def check_machine(config: DictConfig, opd: OPDConfig, starting: bool) -> None:
    """The run folder; devices only for a run that starts here, since a plan may be for another machine.

    Raises:
        ConfigError: one sentence.
    """
    check_folder("opd.run_dir", Path(opd.run_dir))
    if config.trainer.save_freq > 0:
        check_folder("trainer.default_local_dir", Path(config.trainer.default_local_dir))
    if starting:
        check_cluster()
    if not on_cluster():
        check_bookkeeping(pools(opd, config), config)
        if starting:
            check_devices(config, opd)


def check_loggers(config: DictConfig) -> None:
    known, wanted = loggers(), config.trainer.logger
    if wanted is None:
        raise ConfigError("trainer.logger=null must be a list of names: write trainer.logger=[] for none.")
    for name in [wanted] if isinstance(wanted, str) else list(wanted or ()):
        if name not in known:
            listed = ", ".join(known)
            raise ConfigError(f"trainer.logger={name} does not exist; choose of: {listed}.{did_you_mean(name, known)}")
        package = {"vemlp_wandb": "volcengine_ml_platform", "console": None, "file": None}.get(name, name)
        if package and name != "tensorboard" and importlib.util.find_spec(package) is None:
            raise ConfigError(f"trainer.logger={name} needs the package {package}: install it, or take the logger out.")


def check_folder(key: str, folder: Path) -> None:
    """The folder of a key can be made and written to; looks without making it."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"{key}={folder} cannot be a folder, because {there} is a file: choose another.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise refuse(f"{key}={folder} cannot be written: choose a folder of yours", error) from None


def check_room(run: Run, findings: Findings) -> None:
    """Disk for the checkpoints of a run.

    Raises:
        ConfigError: not even one of them fits.
    """
    if not run.saves:
        return
    one = sum(checkpoint_bytes(run).values())
    all_of_them, count = on_disk(run)
    there = next(parent for parent in (Path(run.run_dir), *Path(run.run_dir).parents) if parent.exists())
    free = shutil.disk_usage(there).free
    findings.fact(
        "disk", f"{free / GiB:,.0f} GiB free, a checkpoint takes {one / GiB:.2g} GiB, there are {count} at most"
    )
    if one > free:
        raise ConfigError(
            f"A checkpoint takes {one / GiB:.1f} GiB and {there} has {free / GiB:.1f} GiB free: choose another "
            "opd.run_dir, or trainer.save_freq=-1."
        )
    if all_of_them > free:
        findings.note(
            f"{count} checkpoints, one that is being written among them, take {all_of_them / GiB:.0f} GiB and "
            f"{free / GiB:.0f} GiB are free: lower trainer.max_actor_ckpt_to_keep."
        )


def check_cluster() -> None:
    """A cluster that was started here and then killed leaves its address behind, and Ray would try to join it.

    Raises:
        ConfigError: nobody answers at that address.
    """
    if os.environ.get("RAY_ADDRESS") or not (note := _started_here()).exists():
        return
    host, _, port = note.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        raise ConfigError(
            f"{note} names a Ray cluster of this machine that does not answer ({host}:{port}): run `ray stop`, which "
            "takes the note away, or start the cluster again."
        ) from None


def check_devices(config: DictConfig, opd: OPDConfig, count: Callable[[], int] | None = None) -> None:
    """The run's parts against what this machine has; ``count`` says how many GPUs there are."""
    trainer, ranks = config.trainer, config.trainer.n_gpus_per_node
    if trainer.nnodes > 1:
        raise ConfigError(
            f"trainer.nnodes={trainer.nnodes} needs a Ray cluster and none runs here: start one (`ray start`) and set "
            "RAY_ADDRESS, or set trainer.nnodes=1."
        )
    if opd.device == "cuda":
        check_visible(pools(opd, config), (count or _gpus)())
        return
    cores = config.ray_kwargs.ray_init.get("num_cpus")
    if cores is not None and ranks * CORES_PER_RANK > cores:
        raise ConfigError(
            f"trainer.n_gpus_per_node={ranks} asks Ray for {ranks * CORES_PER_RANK} cores and "
            f"ray_kwargs.ray_init.num_cpus={cores}: lower the former or raise the latter, which is bookkeeping."
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def on_cluster() -> bool:
    """Whether Ray will join a cluster, whose machines are not this one: it is named, or was started here."""
    return bool(os.environ.get("RAY_ADDRESS")) or _started_here().exists()


def _started_here() -> Path:
    """Where `ray start` writes down which cluster is this machine's."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
