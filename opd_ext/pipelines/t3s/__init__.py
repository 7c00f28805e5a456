# SPDX-License-Identifier: Apache-2.0
"""T3S, training-trajectory-aware token selection (arXiv 2601.10348): ``opd t3s``."""

from opd_ext.pipelines.t3s.selection import (
    Bottleneck,
    fraction_below_base,
    keep_mask,
    lowest_confidence_keep,
    pick_bottleneck,
    random_keep,
    residual_transfer,
    restore_mask,
    selection_statistics,
)

__all__ = [
    "Bottleneck",
    "fraction_below_base",
    "keep_mask",
    "lowest_confidence_keep",
    "pick_bottleneck",
    "random_keep",
    "residual_transfer",
    "restore_mask",
    "selection_statistics",
]
