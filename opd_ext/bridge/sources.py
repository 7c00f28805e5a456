# SPDX-License-Identifier: Apache-2.0
"""Where verl defines what a configuration names, found in its text: importing verl takes seconds."""

import importlib.util
import re
from pathlib import Path


def policy_loss_source(name: str) -> tuple[Path, int] | None:
    """File and line of a policy loss in verl's registry; None if verl's own file has no such loss."""
    verl = importlib.util.find_spec("verl")
    if verl is None or verl.origin is None:
        return None
    file = Path(verl.origin).parent / "trainer" / "ppo" / "core_algos.py"
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if re.search(rf"register_policy_loss\(\s*[\"']{re.escape(name)}[\"']", line):
            return file, number
    return None
