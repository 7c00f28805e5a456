# SPDX-License-Identifier: Apache-2.0
"""``opd.plan`` and a pipeline's ``plan``: what a plan assumes, because no configuration says it; no run reads it."""

from dataclasses import dataclass

from opd_ext.errors import ConfigError, positive

_SHARES = ("mfu_train", "mfu_forward", "bandwidth_share")
_POSITIVE = ("gpus_per_node", "nodes", "mean_response", "mean_val_response", "mean_prompt", "mean_teacher_prompt",
             "length_spread", "disk_gb_s", "sync_gb_s")  # fmt: skip


@dataclass
class Assumptions:
    """The machine and the sizes that a plan reckons with, of a run or of a pipeline; every one is printed with it."""

    gpu: str | None = None  # h200 | h100 | a100 | a100_40gb | l40s | rtx4090 | cpu; null: by the device, h200 or cpu
    gpus_per_node: int | None = None  # GPUs that a node has; null: as many as are used. More than there are is refused
    nodes: int | None = None  # nodes that there are; null: as many as are used
    mean_response: float | None = None  # tokens of a training response; null: by the limit and whether the model thinks
    mean_val_response: float | None = None  # tokens of a validation response; null: by data set
    mean_prompt: int = 300  # tokens of a prompt
    length_spread: float = 0.75  # standard deviation of the logarithm of a response's length
    mfu_train: float = 0.40  # share of the peak FLOP/s that an update reaches
    mfu_forward: float = 0.45  # share of the peak FLOP/s that a pass without gradients reaches
    bandwidth_share: float = 0.78  # share of the memory's bandwidth that decoding reaches
    allreduce_us: float = 12.0  # microseconds of one all-reduce of a decoding step under tensor parallelism
    disk_gb_s: float = 3.0  # GB/s at which all ranks together write a checkpoint

    def check(self, key: str) -> None:
        """Refuse what no machine has; ``key`` is where it stands.

        Raises:
            ConfigError: one sentence.
        """
        for name in _SHARES:
            positive(f"{key}.{name}", getattr(self, name), at_most=1)
        for name in _POSITIVE:
            if (value := getattr(self, name, None)) is not None:
                positive(f"{key}.{name}", value)
        positive(f"{key}.allreduce_us", self.allreduce_us, zero=True)


@dataclass
class PlanConfig(Assumptions):
    """What `opd plan` reckons with beside the assumptions of all plans."""

    mean_teacher_prompt: int | None = None  # tokens of the teacher's prompt; null: by opd.context.kind
    sync_gb_s: float = 6.3  # GB/s at which weights travel from the trainer to vLLM


def check_devices(plan: Assumptions, key: str, wanted: int) -> None:
    """Refuse a stage of a pipeline that asks, by ``key``, for more GPUs than there are.

    Raises:
        ConfigError: one sentence.
    """
    there = (plan.gpus_per_node or 0) * (plan.nodes or 1)
    if there and wanted > there:
        raise ConfigError(
            f"{key} = {wanted} GPUs, and there are {plan.nodes or 1} node(s) of {plan.gpus_per_node}: lower it, or say "
            "what there is in plan.nodes and plan.gpus_per_node."
        )
