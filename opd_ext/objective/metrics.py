# SPDX-License-Identifier: Apache-2.0
"""Sums and counts from which a step's metrics are made, whatever the split of its batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor


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


_SUM, _COUNT = ":sum", ":count"


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """``name -> sum / count`` for every pair of :meth:`Objective.sums`; groups without a token are left out."""
    names = [key[: -len(_SUM)] for key in sums if key.endswith(_SUM)]
    return {name: sums[name + _SUM] / sums[name + _COUNT] for name in names if sums[name + _COUNT] > 0}
