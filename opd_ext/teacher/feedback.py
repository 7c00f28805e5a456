# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.context.feedback; this name goes with release 0.3."""

from opd_ext.context.feedback import *  # noqa: F403
