# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.pipelines.t3s; this name goes with release 0.3."""

from opd_ext.pipelines.t3s.selection import *  # noqa: F403
