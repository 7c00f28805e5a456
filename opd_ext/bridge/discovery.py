# SPDX-License-Identifier: Apache-2.0
"""Test-time self-distillation: attempts are counted, and the run ends at the first that is right."""

from pathlib import Path
from typing import Any

from opd_ext.checkpoints.layout import TrainerState
from opd_ext.files import write_jsonl


def record_attempts(
    rows: list[dict[str, Any]], wanted: float | None, state: TrainerState, step: int, run_dir: Path
) -> int | None:
    """Count the rollouts of a step, and write ``discovery.json``.

    Args:
        wanted: the score at which an attempt is right; None: nothing is looked for.

    Returns:
        Which attempt of the run was the first that is right, from 1; None: none of these.
    """
    if wanted is None:
        return None
    successes = [i for i, row in enumerate(rows, 1) if row["score"] >= wanted]
    attempt = state.attempts + successes[0] if successes else None
    state.attempts += len(rows)
    write_jsonl(run_dir / "discovery.json", [{"attempts": state.attempts, "found": attempt, "step": step}])
    return attempt
