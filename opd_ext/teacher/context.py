# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.context; this name goes with release 0.3."""

from opd_ext.context.base import *  # noqa: F403
from opd_ext.context.config import *  # noqa: F403
from opd_ext.context.contexts import *  # noqa: F403
from opd_ext.context.sequence import *  # noqa: F403
