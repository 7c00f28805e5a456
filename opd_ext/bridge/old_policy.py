# SPDX-License-Identifier: Apache-2.0
"""Old log-probs without a pass of their own: in front of its only step a policy is the current one.

The loss then takes its own log-probs, detached, for the old ones. What else is made of them (verl's metrics of entropy
and of the sampler, weights that correct for it) is made in the loss, or from what the update has kept of its rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_F

from opd_ext.config import old_policy
from opd_ext.ratios import importance_clip

CURRENT = "opd_old_is_current"
"""Key of a batch: the update takes its own log-probs for the old ones, and keeps them to be asked for."""
CAP = "opd_sampler_cap"
"""Key of a batch: cap of the weights that correct for the sampler, where something does."""
ENTROPY = "opd_entropy"
"""Key of an update's outputs: entropies that only metrics read."""
_ENTROPY_ROWS = 128  # of whole logits that are read as float32 at a time


def is_current(data: TensorDict) -> bool:
    """Whether the update of this batch takes its own log-probs for the old ones."""
    return tu.get_non_tensor_data(data, CURRENT, False)


def anchored(loss_function: Callable, rows: torch.Tensor) -> Callable:
    """verl's policy loss with the current policy as the old one.

    The ratio is exactly 1, and its gradient is that of the log-prob.

    Args:
        rows: of the micro-batch's packed sequences, [R]: those that predict the response tokens.
    """

    def loss(model_output: dict, data: TensorDict, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        lengths = data["responses"].offsets().diff().tolist()

        def jagged(values: torch.Tensor) -> torch.Tensor:
            # From offsets alone its longest row would not be known, and verl would pad to the sum of all.
            return torch.nested.as_nested_tensor(list(values.split(lengths)), layout=torch.jagged)

        current = model_output["log_probs"].values().detach()[rows]
        data = data.clone(recurse=False)
        data["old_log_probs"] = jagged(current)
        if (cap := tu.get_non_tensor_data(data, CAP, None)) is not None:
            weights = importance_clip(current, data["rollout_log_probs"].values(), cap)
            data["rollout_is_weights"] = jagged(weights * data["response_mask"].values())
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)

    return loss


@torch.no_grad()
def entropies(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Entropies in nats [N] of whole logits [N, V], divided by temperatures [N]; a few rows at a time."""
    parts = zip(logits.split(_ENTROPY_ROWS), temperature.split(_ENTROPY_ROWS), strict=True)
    return torch.cat([verl_F.entropy_from_logits(part.float() / heat[:, None]) for part, heat in parts])


def drops_out(module: torch.nn.Module) -> bool:
    """Whether training draws random numbers in a forward pass, so that it is another one than without."""
    config = module.config.get_text_config().to_dict()
    named = [v for k, v in config.items() if ("drop" in k or "jitter" in k) and isinstance(v, (int, float))]
    built = [m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    return any(share > 0 for share in named + built)


# ---------------------------------------------------------------------- in the trainer


@contextmanager
def without_correction(config: DictConfig) -> Iterator[None]:
    """Advantages without the correction for the sampler, whose weights the loss makes."""
    correction, config.algorithm.rollout_correction = config.algorithm.rollout_correction, None
    try:
        yield
    finally:
        config.algorithm.rollout_correction = correction


@contextmanager
def without_whole_entropies(config: DictConfig, old: old_policy.Source) -> Iterator[None]:
    """verl's update without entropies that :func:`report` makes: 30 GiB of 34,816 tokens of Qwen3-8B."""
    actor = config.actor_rollout_ref.actor
    wanted, actor.calculate_entropy = actor.calculate_entropy, old_policy.whole_entropies(config, old)
    try:
        yield
    finally:
        actor.calculate_entropy = wanted


def announce(trainer: Any, batch: KVBatchMeta) -> None:
    """Tell the workers that the coming update is a batch's only one."""
    batch.extra_info[CURRENT] = True
    if (cap := old_policy.sampler_cap(trainer.config)) is not None:
        batch.extra_info[CAP] = cap


def report(trainer: Any, batch: KVBatchMeta, metrics: dict) -> None:
    """After the update: verl's metrics of old log-probs, by verl's functions, from what the update has kept."""
    fields, batch.fields = batch.fields, ["input_ids"]
    trainer._compute_old_log_prob(batch, metrics)
    batch.fields = fields
    config = trainer.config
    if not config.actor_rollout_ref.rollout.calculate_log_probs or not config.algorithm.rollout_correction:
        return
    names = ["old_log_probs", "rollout_log_probs", "response_mask"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    rows = DataProto(batch=data.to_padded_tensor())
    metrics.update(compute_rollout_correction_and_add_to_batch(rows, config.algorithm.rollout_correction)[1])
