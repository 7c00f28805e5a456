# SPDX-License-Identifier: Apache-2.0
"""What a run will need before it starts: memory, seconds, disk, hours. Printed by ``opd plan`` and by ``--dry-run``."""

from opd_ext.plan.page import as_json, print_plan

__all__ = ["as_json", "print_plan"]
