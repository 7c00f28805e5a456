# SPDX-License-Identifier: Apache-2.0
"""When the teacher is refreshed and how the weights of the loss terms change over training steps."""

from __future__ import annotations


def trace_schedule(step: int, w0: float, t_start: int, t_decay: int) -> tuple[float, float]:
    """TRACE's annealing (arXiv 2605.10194, eq. 2): ``(lambda, gate)`` of a step that counts from 0.

    ``lambda`` weighs the divergence on the annotated spans: ``w0`` up to step ``t_start``, then linear to 0
    within ``t_decay`` steps, exactly 0 afterwards. ``gate = 1 - lambda / w0`` multiplies the policy term on
    these spans. With ``w0 = 0`` there is no divergence and the gate is 1.

    Raises:
        ValueError: for a negative argument or ``t_decay`` below 1.

    >>> [trace_schedule(step, w0=0.5, t_start=10, t_decay=30) for step in (0, 10, 25, 40)]
    [(0.5, 0.0), (0.5, 0.0), (0.25, 0.5), (0.0, 1.0)]
    """
    if step < 0 or w0 < 0 or t_start < 0 or t_decay < 1:
        raise ValueError(
            f"trace_schedule needs step, w0, t_start >= 0 and t_decay >= 1; got {step}, {w0}, {t_start}, {t_decay}."
        )
    remaining = min(1.0, max(0.0, 1.0 - (step - t_start) / t_decay))
    return (w0 * remaining, 1.0 - remaining) if w0 > 0 else (0.0, 1.0)
