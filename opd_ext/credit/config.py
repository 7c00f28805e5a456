# SPDX-License-Identifier: Apache-2.0
"""``opd.credit``: its keys, their check and their words."""

from dataclasses import dataclass, field
from typing import Any

from opd_ext.credit.annotate.config import AnnotatorConfig


@dataclass
class CreditConfig:
    """Which tokens count, and how much; every other key is an option of that credit."""

    kind: str = "uniform"
    weight: float = 1.0  # of the whole distillation term
    hold: int | None = None  # steps at full weight before it falls; null: for ever
    decay: int = 30  # steps in which it then falls to 0
    importance_cap: float | None = None  # cap of current to old policy (SDPO: 2)
    rollout_cap: float | None = None  # cap of old policy to rollout engine (IW-OPD: 5)
    inactive_span: str = "nonspan"  # spans of a class without divergence: nonspan (plain policy term) | literal (gated)
    annotator: AnnotatorConfig | None = None
    args: dict[str, Any] = field(default_factory=dict)
