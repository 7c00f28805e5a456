# SPDX-License-Identifier: Apache-2.0
"""Alarms of a training run: their signs, their record, and the way back to an earlier checkpoint."""
