# SPDX-License-Identifier: Apache-2.0
"""When the teacher is refreshed and how the weights of the loss terms change over training steps."""

from __future__ import annotations


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


def trace_schedule(step: int, w0: float, t_start: int, t_decay: int) -> tuple[float, float]:
    """TRACE's annealing (arXiv 2605.10194, eq. 2): ``(lambda, gate)`` of a step that counts from 0.

    ``lambda`` weighs the divergence on the annotated spans: ``w0`` up to step ``t_start``, then linear to 0
    within ``t_decay`` steps, exactly 0 afterwards. ``gate = 1 - lambda / w0`` multiplies the policy term on
    these spans. With ``w0 = 0`` there is no divergence and the gate is 1.

    Raises:
        ValueError: for a negative argument or ``t_decay`` below 1.
    """
    if step < 0 or w0 < 0 or t_start < 0 or t_decay < 1:
        raise ValueError(
            f"trace_schedule needs step, w0, t_start >= 0 and t_decay >= 1; got {step}, {w0}, {t_start}, {t_decay}."
        )
    remaining = min(1.0, max(0.0, 1.0 - (step - t_start) / t_decay))
    return (w0 * remaining, 1.0 - remaining) if w0 > 0 else (0.0, 1.0)
