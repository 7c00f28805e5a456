# SPDX-License-Identifier: Apache-2.0
"""verl's jagged micro-batches as the objective sees them, and its policy loss as the objective calls it."""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import Metric

from opd_ext.bridge import likeliest, old_policy
from opd_ext.objective.alignment import packed_response_rows
from opd_ext.objective.batch import MicroBatch, PolicyTerm, Shape
from opd_ext.objective.shares import Share


def packed_rows(input_ids: torch.Tensor, response_lens: torch.Tensor) -> torch.Tensor:
    """Rows of a packed batch whose logits predict the response tokens, [R] int64."""
    offsets = input_ids.offsets()
    return packed_response_rows(offsets, offsets.diff() - response_lens, response_lens)


def restarting_positions(ids: torch.Tensor) -> torch.Tensor:
    """Position ids 0, 1, ... for every sequence of a jagged ``ids`` [B, j1] (jagged like ``ids``)."""
    positions = [torch.arange(length) for length in ids.offsets().diff().tolist()]
    return torch.nested.as_nested_tensor(positions, layout=torch.jagged)


def pack_lengths(input_ids: torch.Tensor) -> dict[str, Any]:
    """What flash attention of transformers would otherwise find out in every layer, waiting for the device each time.

    Args:
        input_ids: jagged [B, j1], packed without padding.

    Returns:
        ``cu_seq_lens_q`` and ``_k``, [B + 1] int32: where each sequence begins, and the end; ``max_length_q`` and
        ``_k``: tokens of the longest, on the host. Read once, which waits for the device once.
    """
    offsets = input_ids.offsets()
    longest, bounds = int(offsets.diff().max()), offsets.to(torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def like_ids(values: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Response rows [R] in the layout of verl's model outputs: jagged like ``ids``."""
    everywhere = values.new_zeros(ids.values().shape[0]).index_copy(0, rows, values)
    return torch.nested.nested_tensor_from_jagged(everywhere, ids.offsets())


def is_distilled(data: TensorDict) -> bool:
    """Whether a batch takes the distillation step; every other one takes verl's own."""
    return "has_teacher" in data.keys()


def objective_batch(
    data: TensorDict, lengths: torch.Tensor, rows: torch.Tensor, share: Share | None = None
) -> MicroBatch:
    """The objective's view of verl's micro-batch; ``share``: whose rows are whose, where ranks share sequences."""

    def packed(name: str) -> torch.Tensor | None:
        return data[name].values() if name in data else None

    return MicroBatch(
        labels=data["responses"].values(),
        mask=data["loss_mask"].values(),
        lengths=lengths,
        num_tokens=data["opd_tokens"],
        num_sequences=data["opd_sequences"],
        num_micro_batches=data["opd_micro_batches"],
        dp_size=data["dp_size"],
        rollout_log_probs=packed("rollout_log_probs"),
        old_log_probs=packed("old_log_probs"),
        sample_mask=data["has_teacher"].bool(),
        span_label=packed("span_label"),
        distillation_weight=data["opd_distillation_weight"],
        gate=data["opd_gate"],
        share=share,
        # Row j of what a server returns scores token j + 1, as row j of the logits does.
        **likeliest.read(data, rows),
    )


def policy_term(
    data: TensorDict, rows: torch.Tensor, loss_function: Callable, metrics: dict[str, Metric]
) -> PolicyTerm:
    """verl's own loss of this micro-batch as a function of response log-probs; it fills ``metrics``."""
    ids = data["input_ids"]
    if old_policy.is_current(data):
        loss_function = old_policy.anchored(loss_function, rows)

    def policy(log_prob: torch.Tensor, entropy: torch.Tensor, shape: Shape | None) -> torch.Tensor:
        batch = data
        if shape is not None:
            advantages = data["advantages"]
            shaped = shape(advantages.values()).split(advantages.offsets().diff().tolist())
            batch = data.clone(recurse=False)
            batch["advantages"] = torch.nested.as_nested_tensor(list(shaped), layout=torch.jagged)
        output = {"log_probs": like_ids(log_prob, ids, rows)}
        if tu.get_non_tensor_data(data, "calculate_entropy", False):
            output["entropy"] = like_ids(entropy, ids, rows)
        loss, found = loss_function(model_output=output, data=batch)
        metrics.update(found)
        return loss

    return policy
