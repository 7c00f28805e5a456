# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits: checkpoints on the disk, and what the plan says of memory, on the devices that are here."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from opd_ext.config.schema import OPDConfig
from opd_ext.doctor.devices import Gpu, NoDriver, installed_gpus, usable
from opd_ext.errors import ConfigError
from opd_ext.plan.advice import grave
from opd_ext.plan.memory import CONTEXT, states
from opd_ext.plan.run import Run, read_run
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.machine import check_room, on_cluster

GiB, MiB = 2**30, 2**20


def check_size(config: DictConfig, opd: OPDConfig, starting: bool, findings: Findings) -> None:
    """Disk and, of a run that starts, memory; a plan says the latter itself, of the machine that it is for.

    Raises:
        ConfigError: not even one checkpoint fits, or not even weights and moments do.
    """
    if not starting and not Path(config.actor_rollout_ref.model.path).expanduser().is_dir():
        return
    if (run := read_run(config, opd)) is None:
        return
    check_room(run, findings)
    if starting:
        check_memory(run, findings)


def check_memory(run: Run, findings: Findings, gpus: Callable[[], list[Gpu]] = installed_gpus) -> None:
    """Notes of what the plan expects to overflow; of a cluster, whose devices are elsewhere, as ``opd.plan.gpu`` is.

    Args:
        gpus: those of this machine.

    Raises:
        ConfigError: what certainly cannot be: exact sizes alone are more than a device that is here has.
    """
    if run.device == "cuda" and not on_cluster() and (memory := _smallest(gpus)) is not None:
        run = replace(run, machine=replace(run.machine, memory=memory))
        _certain(run)
    for sentence in grave(run):
        findings.note(sentence)


def _smallest(gpus: Callable[[], list[Gpu]]) -> float | None:
    """Bytes of the smallest GPU that a run may use; None where the driver does not say."""
    try:
        sizes = [gpu.total * MiB for gpu in usable(gpus()) if not math.isnan(gpu.total)]
    except NoDriver:
        return None
    return min(sizes, default=None)


def _certain(run: Run) -> None:
    room, weights = run.machine.memory, run.student.parameters * run.vllm_width / run.tp
    if run.vllm_share is not None and weights > run.vllm_share * room:
        raise ConfigError(
            f"actor_rollout_ref.rollout.gpu_memory_utilization={run.vllm_share:g} gives vLLM "
            f"{run.vllm_share * room / GiB:.1f} of {room / GiB:.1f} GiB, and the weights of {run.student.name} alone "
            f"take {weights / GiB:.1f}: raise it or .tensor_model_parallel_size, or choose a smaller model."
        )
    here, _ = states(run, gradients=True, updating=True)
    if (held := sum(here.values()) + CONTEXT) > room:
        parts = ", ".join(f"{name} {size / GiB:.1f}" for name, size in here.items())
        lora = "" if run.adapter else ", LoRA (actor_rollout_ref.model.lora_rank)"
        raise ConfigError(
            f"An update holds {held / GiB:.1f} GiB ({parts}) before it computes anything, and a GPU here has "
            f"{room / GiB:.1f}: use more GPUs, a smaller model{lora} or "
            "actor_rollout_ref.actor.fsdp_config.offload_policy=true."
        )
