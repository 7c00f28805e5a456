# SPDX-License-Identifier: Apache-2.0
"""Numbers for a terminal or a log: one aligned line per training step."""

import math
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.text import Text

from opd_ext.terminal import terminal


class StepPrinter:
    """One line of fixed width per step, made for logs: nothing wraps or moves, colours on terminals only.

    The titles are repeated every ``header_every`` rows, so that any screenful of a long log can be read. A
    metric that the step does not have is a dash. Validation rows share the columns and begin with ``val``.

    Args:
        total_steps: if known, rows show ``step/total`` and the time left, from the last ten steps.
        console: where to print; standard output by default.
        header_every: rows between two headers.
    """

    _COLUMNS = (
        ("step", 9),
        ("loss", 9),
        ("KL", 8),
        ("entropy s/t", 13),
        ("acc %", 7),
        ("tokens", 8),
        ("trunc %", 8),
        ("age", 5),
        ("gen/update/step s", 19),
        ("grad", 8),
        ("left", 9),
    )

    def __init__(self, total_steps: int | None = None, console: Console | None = None, header_every: int = 20):
        self._total = total_steps
        self._console = console or terminal()
        self._header_every = header_every
        self._rows = 0
        self._recent_seconds: deque[float] = deque(maxlen=10)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of one training step; ``metrics`` are those of ``metrics.jsonl``."""
        seconds = [metrics.get(f"timing_s/{name}") for name in ("gen", "update_actor", "step")]
        if seconds[-1] is not None:
            self._recent_seconds.append(seconds[-1])
        entropies = [metrics.get(f"opd/{who}_entropy") for who in ("student", "teacher")]
        cells = [
            f"{step}/{self._total}" if self._total else str(step),
            _number(metrics.get("opd/loss"), 4),
            _number(metrics.get("opd/divergence"), 4),
            "/".join(_number(value, 3) for value in entropies),
            _number(metrics.get("rollout/accuracy"), 1, scale=100),
            _number(metrics.get("rollout/tokens_mean"), 1),
            _number(metrics.get("rollout/truncated"), 1, scale=100),
            _number(metrics.get("teacher/age"), 0),
            "/".join(_number(value, 2) for value in seconds),
            _number(metrics.get("opd/grad_norm"), 3),
            self._time_left(step),
        ]
        broken = any(isinstance(value, float) and not math.isfinite(value) for value in metrics.values())
        self._row(cells, style="bold red" if broken else "")

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of one validation: ``val/accuracy``, ``val/tokens_mean``, ``val/truncated``."""
        cells = [""] * len(self._COLUMNS)
        cells[0] = f"val {step}"
        cells[4] = _number(metrics.get("val/accuracy"), 1, scale=100)
        cells[5] = _number(metrics.get("val/tokens_mean"), 1)
        cells[6] = _number(metrics.get("val/truncated"), 1, scale=100)
        self._row(cells, style="bold cyan")

    def _row(self, cells: list[str], style: str) -> None:
        if self._rows % self._header_every == 0:
            self._print([title for title, _ in self._COLUMNS], "bold")
        self._rows += 1
        self._print(cells, style)

    def _print(self, cells: list[str], style: str) -> None:
        line = "".join(cell.rjust(width) for cell, (_, width) in zip(cells, self._COLUMNS, strict=True))
        self._console.print(Text(line.rstrip(), style=style), soft_wrap=True)

    def _time_left(self, step: int) -> str:
        if not self._total or not self._recent_seconds:
            return "-"
        mean = sum(self._recent_seconds) / len(self._recent_seconds)
        return str(timedelta(seconds=round(mean * max(self._total - step, 0))))


def _number(value: float | None, decimals: int, scale: float = 1) -> str:
    if value is None:
        return "-"
    value = float(value) * scale
    # Five digits are what the columns hold; beyond that the order of magnitude is the message.
    return f"{value:.{decimals}f}" if abs(value) < 1e5 or not math.isfinite(value) else f"{value:.1e}"
