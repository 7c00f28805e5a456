# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.divergence; this name goes with release 0.3."""

from opd_ext.divergence.divergences import *  # noqa: F403
from opd_ext.divergence.sampled import *  # noqa: F403
