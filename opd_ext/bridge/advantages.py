# SPDX-License-Identifier: Apache-2.0
"""What is done to verl's advantages before the update: weights that need the whole batch."""

from collections.abc import Sequence

import torch
import transfer_queue as tq
from jaxtyping import Float, Shaped
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from opd_ext.policy import PolicyConfig, prompt_mean_scale


def weigh_advantages(batch: KVBatchMeta, policy: PolicyConfig, mini_batches: int) -> None:
    """Scale the advantages in the queue (:func:`weighed`).

    Args:
        mini_batches: optimiser steps that share the batch.
    """
    if policy.weight == 1.0 and not policy.prompt_mean:
        return
    fields = ["advantages", "response_mask"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    lengths = data["advantages"].offsets().diff().tolist()
    padded = {name: data[name].to_padded_tensor(0) for name in fields}
    groups = [key.rsplit("_", 2)[0] for key in batch.keys]
    advantages = weighed(padded["advantages"], padded["response_mask"], groups, policy, mini_batches)
    rows = [row[:length] for row, length in zip(advantages, lengths, strict=True)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    shaped = tu.get_tensordict({"advantages": nested})
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=shaped)


def weighed(
    advantages: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    groups: Sequence[str],
    policy: PolicyConfig,
    mini_batches: int,
) -> Float[Tensor, "B T"]:
    """Advantages of a batch, in which every policy loss is linear, as its policy term weighs them.

    By ``policy.weight``, and with ``policy.prompt_mean`` so that every prompt of the batch counts the same. What a
    teacher has a say in is done in the loss itself (:mod:`opd_ext.policy.shapings`).

    Args:
        mask: trained tokens, 0/1 or bool.
        groups: the prompt of each row.
        mini_batches: optimiser steps that share the batch.
    """
    advantages = policy.weight * advantages
    if policy.prompt_mean:
        advantages = advantages * prompt_mean_scale(groups, mask, mini_batches)[:, None]
    return advantages
