# SPDX-License-Identifier: Apache-2.0
"""The third place of a method: what is compared, on which part of the vocabulary (``opd.divergence``)."""

from opd_ext.divergence.config import Branch, DivergenceConfig, DivergenceTerm
from opd_ext.divergence.divergences import (
    clipped_fraction,
    divergence_names,
    entropy,
    forward_kl,
    get_divergence,
    jsd,
    log_probs,
    register_divergence,
    reverse_kl,
    topk_divergence,
)
from opd_ext.divergence.known import TopK, known_clipped_fraction, known_topk_divergence
from opd_ext.divergence.sampled import Surrogate, clipped_surrogate, sampled_advantage, sampled_kl

__all__ = [
    "Branch",
    "DivergenceConfig",
    "DivergenceTerm",
    "Surrogate",
    "TopK",
    "clipped_fraction",
    "clipped_surrogate",
    "divergence_names",
    "entropy",
    "forward_kl",
    "get_divergence",
    "jsd",
    "known_clipped_fraction",
    "known_topk_divergence",
    "log_probs",
    "register_divergence",
    "reverse_kl",
    "sampled_advantage",
    "sampled_kl",
    "topk_divergence",
]
