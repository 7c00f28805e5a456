# SPDX-License-Identifier: Apache-2.0
"""The best validation so far: its checkpoint is kept, and a run that has fallen far below it ends.

Both are read from ``metrics.jsonl``, which a resumed run cuts to the step that it resumes from.
"""

import math
from pathlib import Path

from opd_ext.files import read_jsonl

STANDARD_ERRORS = 3.0  # how far apart two validations must be to count as different


def validations(run_dir: Path) -> dict[int, float]:
    """Step -> accuracy of every validation, as a share, in the order of the steps.

    Of the monitor where the run has one: it looks at each of these steps, and the full protocol at some of them.
    """
    path = run_dir / "metrics.jsonl"
    lines = list(read_jsonl(path, cut_off_end=True)) if path.exists() else []
    phase = "monitor" if any(line["phase"] == "monitor" for line in lines) else "val"
    found = {line["step"]: line.get(f"{phase}/accuracy", math.nan) for line in lines if line["phase"] == phase}
    return {step: share for step, share in sorted(found.items()) if math.isfinite(share)}  # not of ungraded data


def best_step(accuracies: dict[int, float]) -> int | None:
    """The step of the highest accuracy, of equals the latest; None without a validation."""
    return max(accuracies, key=lambda step: (accuracies[step], step), default=None)


def collapse(accuracies: dict[int, float], problems: int, share: float | None) -> str | None:
    """What to say if the latest validation is below ``share`` of the best one, and not by chance; else None.

    Args:
        accuracies: step -> accuracy.
        problems: of a validation. Two accuracies differ if they are three standard errors of two independent samples
            of so many problems apart; samples of one problem do not count, which errs on the side of going on.
        share: in (0, 1]; None: never.
    """
    if share is None or len(accuracies) < 2:
        return None
    last, first = max(accuracies), max(accuracies, key=lambda step: (accuracies[step], step))
    now, then = accuracies[last], accuracies[first]
    mean = (now + then) / 2
    noise = math.sqrt(2 * mean * (1 - mean) / problems)
    if now >= share * then or then - now <= STANDARD_ERRORS * noise:
        return None
    return (
        f"collapsed: accuracy is {now:.1%} at step {last} and was {then:.1%} at step {first}; the run ends here, and "
        "the checkpoint of the best validation is kept. Lower the learning rate, or set opd.stop_on_collapse=null to "
        "go on whatever happens."
    )
