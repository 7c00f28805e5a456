# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.credit; this name goes with release 0.3."""

from opd_ext.credit.credits import *  # noqa: F403
from opd_ext.ratios import *  # noqa: F403
