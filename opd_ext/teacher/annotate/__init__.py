# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.credit.annotate; this name goes with release 0.3."""

from opd_ext.credit.annotate import *  # noqa: F403
