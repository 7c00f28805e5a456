# SPDX-License-Identifier: Apache-2.0
"""Ratios of probabilities: bounded, truncated, detached."""

from jaxtyping import Float
from torch import Tensor

# exp(20) is far beyond any useful ratio; the bound keeps a broken log-prob from becoming inf.
LOG_RATIO_BOUND = 20.0


def importance_clip(
    logp: Float[Tensor, "*tokens"], old_logp: Float[Tensor, "*tokens"], cap: float
) -> Float[Tensor, "*tokens"]:
    """Truncated importance weight ``min(exp(logp - old_logp), cap)``, detached.

    One-sided and per token: SDPO (arXiv 2601.20802) uses cap 2, IW-OPD's trainer against its rollout engine
    cap 5. Positions without a trained token are the caller's to mask.

    Raises:
        ValueError: for a cap that is not positive.

    >>> import torch
    >>> importance_clip(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-0.5, -1.0, -3.0]), cap=2.0)
    tensor([0.6065, 1.0000, 2.0000])
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive but is {cap}.")
    log_ratio = (logp.detach() - old_logp.detach()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return log_ratio.exp().clamp(max=cap)
