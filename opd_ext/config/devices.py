# SPDX-License-Identifier: Apache-2.0
"""The devices that a run asks for, part by part: for every check and plan that counts them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from omegaconf import DictConfig

from opd_ext.config.assumptions import PlanConfig
from opd_ext.config.one_step_off import SEPARATE
from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError

_ROLLOUT = "actor_rollout_ref.rollout"
SAMPLE = "sample"


@dataclass(frozen=True)
class Pool:
    """Devices of one part of a run.

    Attributes:
        does: what for, as in "4 that sample".
        key: what lowers their number.
        total: devices.
        together: how many of them must be of one node.
        nodes: over how many nodes they are laid out; 1 where Ray places them.
    """

    does: str
    key: str
    total: int
    together: int
    nodes: int = 1


def of_verl(config: DictConfig) -> list[Pool]:
    """Those that verl lays out: the trainer's, on which vLLM mostly samples, too, and what has devices beside them."""
    trainer, rollout, reward = config.trainer, config.actor_rollout_ref.rollout, config.reward.reward_model
    asked = (
        ("train", "trainer", trainer, True),
        (SAMPLE, _ROLLOUT, rollout, trainer.v1.trainer_mode == SEPARATE),
        ("serve the teacher", "distillation", config.distillation, config.distillation.enabled),
        ("judge", "reward.reward_model", reward, reward.enable and reward.enable_resource_pool),
    )
    return [
        Pool(does, f"{key}.n_gpus_per_node", part.nnodes * part.n_gpus_per_node, part.n_gpus_per_node, part.nnodes)
        for does, key, part, there in asked
        if there and part.nnodes * part.n_gpus_per_node
    ]


def pools(opd: OPDConfig, config: DictConfig) -> list[Pool]:
    """Of all parts of a run that have devices of their own, the trainer's first."""
    serving = [view.opd.teacher.vllm for view in opd.teacher_servers.values()]
    if not serving:
        return of_verl(config)
    most, total = max(each.tensor_parallel_size for each in serving), sum(each.devices for each in serving)
    return [*of_verl(config), Pool("serve the teacher", "opd.teacher.vllm.replicas", total, most)]


def wanted(found: Iterable[Pool]) -> int:
    """Devices in all."""
    return sum(pool.total for pool in found)


def told(found: list[Pool]) -> str:
    """``4 GPUs that train and 4 that sample``."""
    first, *others = found
    parts = [f"{first.total} GPUs that {first.does}", *(f"{pool.total} that {pool.does}" for pool in others)]
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def check_there(plan: PlanConfig, found: list[Pool]) -> None:
    """Refuse a run that asks for more GPUs than its nodes are said to have (``opd.plan``).

    Raises:
        ConfigError: one sentence.
    """
    if plan.gpus_per_node is None:
        return
    nodes = plan.nodes or max(pool.nodes for pool in found)
    there = f"{nodes} node(s) of {plan.gpus_per_node}"
    trainer, *others = found
    if wanted(found) <= nodes * plan.gpus_per_node:
        if wide := [pool for pool in found if pool.together > plan.gpus_per_node]:
            key = wide[0].key.replace("replicas", "tensor_parallel_size")
            raise ConfigError(f"{key} puts {wide[0].together} GPUs on one node, and there are {there}: lower it.")
        return
    if not others:
        raise ConfigError(
            f"trainer.nnodes x trainer.n_gpus_per_node = {trainer.total} GPUs, and there are {there}: lower them, or "
            "say what there is in opd.plan.nodes and opd.plan.gpus_per_node."
        )
    left = (nodes * plan.gpus_per_node - wanted(others)) // trainer.nodes
    lower = f"set trainer.n_gpus_per_node={left} (GPUS={left} before a recipe's script)"
    if left < 1:
        lower = f"lower trainer.n_gpus_per_node and {others[0].key}"
    raise ConfigError(
        f"{told(found)} are {wanted(found)}, and there are {there}: {lower}, or opd.plan.nodes if there are more nodes."
    )


def check_visible(found: list[Pool], visible: int) -> None:
    """Refuse a run that starts on one machine and asks for more GPUs than it has.

    Raises:
        ConfigError: one sentence.
    """
    if wanted(found) <= visible:
        return
    if found[1:]:
        raise ConfigError(
            f"{told(found)} are {wanted(found)}, and {visible} are visible: lower trainer.n_gpus_per_node or "
            f"{found[1].key}."
        )
    raise ConfigError(
        f"opd.device=cuda with trainer.n_gpus_per_node={found[0].total} needs {found[0].total} GPUs and {visible} are "
        "visible: lower it, choose scale=cpu_tiny, or run `opd doctor`."
    )


def check_bookkeeping(found: list[Pool], config: DictConfig) -> None:
    """Refuse a Ray that is told of fewer devices than the run asks for.

    Raises:
        ConfigError: one sentence.
    """
    known = config.ray_kwargs.ray_init.get("num_gpus")
    if known is not None and known < wanted(found):
        raise ConfigError(
            f"ray_kwargs.ray_init.num_gpus={known} has no room for {told(found)}, {wanted(found)} in all: set it to "
            f"{wanted(found)}, or to null, which is what the run asks for on a CPU and what there is on GPUs."
        )


def check_replicas(config: DictConfig) -> None:
    """Every replica of vLLM has all of its devices, and there is one.

    Raises:
        ConfigError: one sentence.
    """
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    key, place = (_ROLLOUT, rollout) if trainer.v1.trainer_mode == SEPARATE else ("trainer", trainer)
    devices = place.nnodes * place.n_gpus_per_node
    sizes = {name: rollout[name] for name in _OF_A_REPLICA if rollout[name] > 1}
    replica = math.prod(sizes.values())
    if devices % replica:
        named = " x ".join(f"{_ROLLOUT}.{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"{named} takes {replica} devices for a replica of vLLM, and {key}.nnodes x {key}.n_gpus_per_node are "
            f"{devices}: choose a divisor of them, or {replica} devices or a multiple."
        )


_OF_A_REPLICA = ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size")
