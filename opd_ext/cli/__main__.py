# SPDX-License-Identifier: Apache-2.0
"""``python -m opd_ext.cli``."""

from opd_ext.cli import app

app()
