# SPDX-License-Identifier: Apache-2.0
"""Whose weights teach."""


def teacher_version(step: int, interval: int) -> int:
    """The student version that serves as the teacher during ``step``, under periodic hard refresh.

    Steps count from 1 and version v is the student after v optimiser steps. The copy is taken after the
    optimiser step whenever ``step % interval == 0`` and used from the next step on (timing of the released
    CRISP code; the pseudocode of arXiv 2603.05433 is one step earlier). So with interval 50, steps 1-50 see
    version 0 and steps 51-100 version 50; interval 1 gives the weights at the start of the step; interval 0
    never refreshes.

    Raises:
        ValueError: for a step below 1 or a negative interval.
    """
    if step < 1:
        raise ValueError(f"Steps count from 1; got {step}.")
    if interval < 0:
        raise ValueError(f"interval must be 0 (never) or positive; got {interval}.")
    return 0 if interval == 0 else (step - 1) // interval * interval
