# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.objective.objective; this name goes with release 0.3."""

from opd_ext.divergence.config import *  # noqa: F403
from opd_ext.divergence.sampled import *  # noqa: F403
from opd_ext.objective.metrics import *  # noqa: F403
from opd_ext.objective.objective import *  # noqa: F403
