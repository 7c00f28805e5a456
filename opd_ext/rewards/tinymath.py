# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.tinymath.grader; this name goes with release 0.3."""

from opd_ext.tinymath.grader import *  # noqa: F403
