# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.pipelines.ssd; this name goes with release 0.3."""

from opd_ext.pipelines.ssd.target import *  # noqa: F403
