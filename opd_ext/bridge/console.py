# SPDX-License-Identifier: Apache-2.0
"""Numbers for a terminal or a log: one aligned line per training step."""

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.text import Text

from opd_ext.progress import since_start
from opd_ext.terminal import terminal

LOSSES = {
    "failed": "failed",
    "too_long": "pairs too long",
    "annotation/failures": "annotations failed",
    "annotation/skipped": "annotations skipped",
}
"""What a step may lose, as shares: the metric (``failed``, ``too_long``: of its phase), and its words."""

_ROWS = {"val": "val", "monitor": "mon"}
"""How the row of a validation begins."""

ALARM = 0.1
"""Share from which a loss is shown as an alarm."""


class RunLog:
    """What a run writes about itself: ``metrics.jsonl``, and ``console.log`` that `opd train` follows.

    Both are appended to, since a resumed run continues them.
    """

    def __init__(self, run_dir: Path, total_steps: int):
        self._metrics = run_dir / "metrics.jsonl"
        self.console = terminal(file=(run_dir / "console.log").open("a", buffering=1), width=120)
        self._printer = StepPrinter(total_steps, self.console)

    def say(self, what: str) -> None:
        """A line about the start of the run."""
        self.console.print(since_start(what), highlight=False, soft_wrap=True)

    def note(self, what: str, style: str = "") -> None:
        """A line between the rows."""
        self.console.print(Text(what, style=style), soft_wrap=True)

    def record(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl`` and one row on the console."""
        numbers = {name: float(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "phase": phase, "time": time.time(), **numbers})
        with self._metrics.open("a") as file:
            file.write(line + "\n")
        if phase == "train":
            self._printer.train(step, numbers)
        else:
            self._printer.validation(step, numbers, phase)


class StepPrinter:
    """One line of fixed width per step, made for logs: nothing wraps or moves, colours on terminals only.

    The titles are repeated every ``header_every`` rows, so that any screenful of a long log can be read. A
    metric that the step does not have is a dash. Validation rows share the columns and begin with ``val`` or ``mon``.

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
        if self._rows % self._header_every == 0:  # the same at every step: once in front of every header
            self._filtered(metrics.get("data/filtered", 0.0))
        self._row(cells, style="bold red" if broken else "")
        self._losses(metrics, "rollout")

    def validation(self, step: int, metrics: Mapping[str, float], phase: str = "val") -> None:
        """Print the line of one validation: accuracy, ``tokens_mean`` and ``truncated`` of its phase.

        ``val`` is the full protocol, ``monitor`` the few problems of a monitor; of ``sets``, the full protocol of some
        sets, each has a line below.
        """
        if phase == "sets":
            for name in sorted(metrics):
                if name.startswith("val/") and name.endswith("/accuracy"):
                    shown = f"{_number(metrics[name], 1, scale=100)} % correct"
                    source = name.removeprefix("val/").removesuffix("/accuracy")
                    tokens = _number(metrics.get(f"val/{source}/tokens_mean"), 1)
                    self._print_line(f"set {source} at step {step}: {shown}, {tokens} tokens", "cyan")
            self._losses(metrics, "val")
            return
        cells = [""] * len(self._COLUMNS)
        cells[0] = f"{_ROWS[phase]} {step}"
        cells[4] = _number(metrics.get(f"{phase}/accuracy"), 1, scale=100)
        cells[5] = _number(metrics.get(f"{phase}/tokens_mean"), 1)
        cells[6] = _number(metrics.get(f"{phase}/truncated"), 1, scale=100)
        self._row(cells, style="bold cyan" if phase == "val" else "cyan")
        self._losses(metrics, phase)

    def _filtered(self, share: float) -> None:
        if share > 0:
            words = f"lost: {share:.1%} of the prompts to train on, too long or refused by the chat template"
            self._print_line(f"ALARM, {words}" if share >= ALARM else words, "bold red" if share >= ALARM else "yellow")

    def _losses(self, metrics: Mapping[str, float], prefix: str) -> None:
        """One line below the row if anything was lost."""
        names = {name if "/" in name else f"{prefix}/{name}": words for name, words in LOSSES.items()}
        lost = {words: metrics[name] for name, words in names.items() if metrics.get(name, 0.0) > 0}
        if lost:
            alarm = max(lost.values()) >= ALARM
            told = ", ".join(f"{words} {share:.1%}" for words, share in lost.items())
            self._print_line(f"{'ALARM, lost' if alarm else 'lost'}: {told}", "bold red" if alarm else "yellow")

    def _row(self, cells: list[str], style: str) -> None:
        if self._rows % self._header_every == 0:
            self._print([title for title, _ in self._COLUMNS], "bold")
        self._rows += 1
        self._print(cells, style)

    def _print(self, cells: list[str], style: str) -> None:
        line = "".join(cell.rjust(width) for cell, (_, width) in zip(cells, self._COLUMNS, strict=True))
        self._print_line(line.rstrip(), style)

    def _print_line(self, line: str, style: str) -> None:
        self._console.print(Text(line, style=style), soft_wrap=True)

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
