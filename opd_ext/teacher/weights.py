# SPDX-License-Identifier: Apache-2.0
"""Moves student weights into the teacher, shard by shard.

Student and teacher are wrapped alike, so the local shards of a rank correspond by name: no parameter is ever
gathered. Weights are those of two models, or of two adapters of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@torch.no_grad()
def copy_shards(src: Mapping[str, Shaped[Tensor, " ..."]], dst: Mapping[str, Shaped[Tensor, " ..."]]) -> None:
    """Hard refresh, in place: ``dst <- src``, rounded to the storage dtype of ``dst``.

    Args:
        src, dst: parameter name -> local tensor of this rank; devices and dtypes may differ.

    Raises:
        ValueError: for different names or shapes; nothing has been written then.
    """
    _check_same(src, dst)
    for name, target in dst.items():
        target.copy_(src[name])


@torch.no_grad()
def ema_shards(src: Mapping[str, Float[Tensor, " ..."]], dst: Mapping[str, Float[Tensor, " ..."]], rate: float) -> None:
    """Moving average, in place: ``dst <- (1 - rate) * dst + rate * src`` (SDPO, arXiv 2601.20802).

    Computed in float32 or wider and rounded once to the storage dtype of ``dst``. A bfloat16 teacher keeps 8
    bits, so an update below 1/256 of a weight vanishes in that rounding; keep slow teachers in float32.

    Args:
        src, dst: parameter name -> local tensor of this rank; devices and dtypes may differ.
        rate: share of the student, 0 (keep the teacher) to 1 (copy the student).

    Raises:
        ValueError: for different names or shapes, or a rate outside [0, 1]; nothing has been written then.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"The EMA rate must lie in [0, 1] but is {rate}; it is the student's share per update.")
    _check_same(src, dst)
    for name, target in dst.items():
        wide = torch.promote_types(torch.float32, target.dtype)
        source = src[name].to(device=target.device, dtype=wide)
        target.copy_(torch.lerp(target.to(wide), source, rate))


def _check_same(src: Mapping[str, Tensor], dst: Mapping[str, Tensor]) -> None:
    if src.keys() != dst.keys():
        differing = sorted(src.keys() ^ dst.keys())
        raise ValueError(
            f"Student and teacher must have the same parameters, but {len(differing)} exist on one side "
            f"only, for example '{differing[0]}'; build both from the same model and wrap policy."
        )
    for name, target in dst.items():
        if src[name].shape != target.shape:
            raise ValueError(
                f"Parameter '{name}' has local shape {tuple(src[name].shape)} in the student and "
                f"{tuple(target.shape)} in the teacher; shard both over the same mesh."
            )
