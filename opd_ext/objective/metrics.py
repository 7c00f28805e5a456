# SPDX-License-Identifier: Apache-2.0
"""Sums and counts from which a step's metrics are made, whatever the split of its batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor

from opd_ext.objective.batch import MicroBatch, Terms
from opd_ext.spans import SPAN_LABELS

_SUM, _COUNT = ":sum", ":count"


def position_buckets(
    response_index: Int[Tensor, "*tokens"], response_len: Int[Tensor, "*#tokens"], edge: int = 100
) -> dict[str, Bool[Tensor, "*tokens"]]:
    """Disjoint, exhaustive masks ``first`` / ``middle`` / ``last`` over response tokens.

    Args:
        response_index: position of each token in its response, from 0.
        response_len: length of that response.
        edge: length of the outer buckets; in a response shorter than twice that, ``first`` takes precedence.
    """
    first = response_index < edge
    last = (response_index >= response_len - edge) & ~first
    return {"first": first, "middle": ~(first | last), "last": last}


def token_class_masks(
    labels: Int[Tensor, "*tokens"], token_ids: Mapping[str, list[int]]
) -> dict[str, Bool[Tensor, "*tokens"]]:
    """One mask per class of token ids, say ``{"think": [...], "eos": [...]}``."""
    return {name: torch.isin(labels, labels.new_tensor(ids)) for name, ids in token_ids.items()}


def masked_sums(
    values: Float[Tensor, "*tokens"],
    mask: Shaped[Tensor, "*tokens"],
    groups: Mapping[str, Bool[Tensor, "*tokens"]],
) -> dict[str, tuple[Float64[Tensor, ""], Float64[Tensor, ""]]]:
    """``{group: (sum of values, number of tokens)}`` over trained tokens, detached.

    Add sums and counts over micro-batches and ranks,
    then divide.
    """
    wide, sums = values.detach().double(), {}
    for name, group in groups.items():
        chosen = mask.bool() & group
        sums[name] = torch.where(chosen, wide, 0.0).sum(), chosen.sum().double()
    return sums


def token_sums(
    batch: MicroBatch,
    terms: Terms,
    token_classes: Mapping[str, list[int]],
    taught: Mapping[str, Bool[Tensor, " N"]] | None = None,
) -> dict[str, float]:
    """Sums and counts over the tokens of a micro-batch; add them over micro-batches and ranks, then :func:`means`.

    Args:
        token_classes: token ids whose divergence is reported apart, by label.
        taught: by the name of each of several teachers, the tokens that are its to teach.
    """
    everywhere = {"": torch.ones_like(batch.mask, dtype=torch.bool)}
    classes = token_class_masks(batch.labels, token_classes)
    if batch.span_label is not None:
        classes |= {name: batch.span_label == label for name, label in SPAN_LABELS.items()}
    groups = everywhere | {f"_{name}": mask for name, mask in (_buckets(batch) | classes).items()}
    parts = {
        "divergence": (terms.divergence, terms.distilled, groups),
        "student_entropy": (terms.student_entropy, batch.mask, everywhere),
        "student_log_prob": (terms.student_log_prob, batch.mask, everywhere),
        "teacher_entropy": (terms.teacher_entropy, terms.distilled, everywhere),
        "teacher_log_prob": (terms.teacher_log_prob, terms.distilled, everywhere),
        "distilled_student_entropy": (terms.student_entropy, terms.distilled, everywhere),
        "credit": (terms.credit, terms.distilled, everywhere),
        "clipped": (terms.clipped, terms.distilled, everywhere),
        "distilled_tokens": (terms.distilled.double(), batch.mask, everywhere),
    }
    if batch.rollout_log_probs is not None:
        parts["rollout_gap"] = ((terms.student_log_prob - batch.rollout_log_probs).abs(), batch.mask, everywhere)
    for name, tokens in (taught or {}).items():
        own = terms.distilled & tokens
        parts |= {
            f"teacher/{name}/divergence": (terms.divergence, own, everywhere),
            f"teacher/{name}/entropy": (terms.teacher_entropy, own, everywhere),
            f"teacher/{name}/token_share": (own.double(), terms.distilled, everywhere),
        }
    found: dict[str, Tensor] = {}
    for name, (values, mask, where) in parts.items():
        if values is None:
            continue
        for suffix, (total, count) in masked_sums(values, mask, where).items():
            found |= {f"{name}{suffix}{_SUM}": total, f"{name}{suffix}{_COUNT}": count}
    return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))  # one transfer for all


def _buckets(batch: MicroBatch) -> dict[str, Tensor]:
    start = torch.cumsum(batch.lengths, dim=0) - batch.lengths
    position = torch.arange(len(batch.mask), device=batch.mask.device) - start[batch.sample]
    buckets = position_buckets(position, batch.lengths[batch.sample])
    return buckets | {"token0": position == 0}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """``name -> sum / count`` for every pair of :func:`token_sums`; groups without a token are left out."""
    names = [key[: -len(_SUM)] for key in sums if key.endswith(_SUM)]
    return {name: sums[name + _SUM] / sums[name + _COUNT] for name in names if sums[name + _COUNT] > 0}
