# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar on a terminal; in a file or a pipe a plain line at least every fifteen seconds."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from opd_ext.terminal import terminal

EVERY_S = 10.0
"""Between two plain lines; also while nothing moves, so that a log tells slow work from a dead process."""

STARTED = "OPD_STARTED"
"""Environment variable of a run's processes: when the run was started, seconds since the epoch."""

Item = TypeVar("Item")


def since_start(what: str) -> str:
    """``what`` behind the seconds that the run of this process has taken so far."""
    now = time.time()
    return f"[{now - float(os.environ.get(STARTED, now)):3.0f} s] {what}"


class Progress(AbstractContextManager):
    """How far one piece of work is.

    Args:
        title: what is being done.
        total: units of work altogether.
        unit: of what is counted, plural, e.g. ``tokens``; the rate is units per second.
        console: where to show it; standard output by default.
        shown: False shows nothing.
        every: seconds between two plain lines where the console is no terminal.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        console: Console | None = None,
        shown: bool = True,
        every: float = EVERY_S,
    ):
        self.title, self.total, self.unit = title, total, unit
        self.completed, self.note = 0, ""
        self._console, self._shown, self._every = console or terminal(), shown, every
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._bars: Bars | None = None
        self._lines: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        if self._shown and self._console.is_terminal:
            rate = _Rate(self)
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                rate,
            )
            self._bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._task = self._bars.add_task(self.title, total=self.total)
            self._bars.start()
        elif self._shown:
            self._print()
            self._lines = threading.Thread(target=self._repeat, daemon=True)
            self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()
        if self._lines is not None:
            self._lines.join()
            self._print()

    def update(self, completed: int | None = None, advance: int = 0, note: str | None = None) -> None:
        """Say how far the work is: ``completed`` units in all, or ``advance`` more; ``note`` is shown beside them."""
        self.completed = (self.completed if completed is None else completed) + advance
        if note is not None:
            self.note = note
        if self._bars is not None:
            self._bars.update(self._task, completed=self.completed)

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.completed / max(time.monotonic() - self._began, 1e-9)

    def line(self) -> str:
        """The plain line: share, count, rate, note, time that is left."""
        seconds = time.monotonic() - self._began
        share = self.completed / self.total if self.total else 1.0
        words = [f"{self.title}: {share:.0%} ({self.completed:,} of {self.total:,} {self.unit})"]
        if self.completed:
            words.append(f"{self._rate()} {self.unit}/s")
        if self.note:
            words.append(self.note)
        if self.completed >= self.total:
            words.append(f"done in {timedelta(seconds=round(seconds))}")
        elif self.completed:
            words.append(f"{timedelta(seconds=round((self.total - self.completed) / self.rate))} left")
        else:
            words.append(f"{seconds:.0f} s so far")
        return ", ".join(words)

    def _rate(self) -> str:
        return f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"

    def _print(self) -> None:
        self._console.print(Text(self.line()), soft_wrap=True)
        self._console.file.flush()

    def _repeat(self) -> None:
        while not self._ended.wait(self._every):
            self._print()


class _Rate(ProgressColumn):
    """Rate and note, as the plain line has them."""

    max_refresh = 0.25

    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def render(self, task: object) -> Text:
        progress = self._progress
        return Text(", ".join(filter(None, (f"{progress._rate()} {progress.unit}/s", progress.note))))


def track(items: Iterable[Item], title: str, total: int, unit: str, console: Console | None = None) -> Iterator[Item]:
    """``items``, one after the other, with their progress shown."""
    with Progress(title, total, unit, console) as progress:
        for item in items:
            yield item
            progress.update(advance=1)
