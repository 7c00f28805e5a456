# SPDX-License-Identifier: Apache-2.0
"""``opd.teacher``: its keys, their check and their words."""

from dataclasses import dataclass


@dataclass
class TeacherConfig:
    """Whose weights the teacher has, and when they are refreshed."""

    weights: str = "periodic"
    interval: int = 50  # optimiser steps between refreshes of `periodic`; 0: never
    rate: float = 0.05  # `ema`: share of the student mixed in per step; `trust_region`: share of the live student
    path: str | None = None  # `external`: folder or hub id of the teacher
    backend: str = "engine"  # engine: colocated with the student; server: verl's teacher servers on their own devices
