# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.context.prompts; this name goes with release 0.3."""

from opd_ext.context.prompts import *  # noqa: F403
from opd_ext.spans import *  # noqa: F403
