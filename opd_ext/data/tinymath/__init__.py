# SPDX-License-Identifier: Apache-2.0
"""Moved to opd_ext.tinymath; this name goes with release 0.3."""
