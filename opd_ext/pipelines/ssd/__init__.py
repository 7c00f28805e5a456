# SPDX-License-Identifier: Apache-2.0
"""SSD, simple self-distillation (arXiv 2604.01193): ``opd ssd``."""

from opd_ext.pipelines.ssd.target import LossSplit, are_short, is_stub, kept_mass, split_loss, truncated_distribution

__all__ = ["LossSplit", "are_short", "is_stub", "kept_mass", "split_loss", "truncated_distribution"]
