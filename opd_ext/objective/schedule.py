# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.credit and opd_ext.teacher; this name goes with release 0.3."""

from opd_ext.credit.schedule import *  # noqa: F403
from opd_ext.teacher.kinds import *  # noqa: F403
