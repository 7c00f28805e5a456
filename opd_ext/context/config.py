# SPDX-License-Identifier: Apache-2.0
"""``opd.context``: its keys, their check and their words."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ContextConfig:
    """What the teacher sees that the student does not; every other key is an option of that context."""

    kind: str = "same"
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = self.args.get("text")
        return f"{self.kind}:{shown}" if shown else self.kind
