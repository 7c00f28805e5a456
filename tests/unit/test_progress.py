# SPDX-License-Identifier: Apache-2.0
"""Progress: a log that goes on while the work stands still, and one way to show it."""

import io
import re
import time
from pathlib import Path

from rich.console import Console

import opd_ext
from opd_ext.progress import EVERY_S, Progress, track


def log() -> Console:
    return Console(file=io.StringIO(), width=40)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_log_gets_lines_while_nothing_moves():
    console = log()
    with Progress("reading", 10, "books", console, every=0.02):
        time.sleep(0.3)
    assert len(lines(console)) >= 5  # fifteen are due; a busy machine may miss some
    assert all(
        line.startswith("reading: 0% (0 of 10 books), ") and line.endswith("s so far") for line in lines(console)
    )


def test_a_line_states_share_rate_note_and_time_left():
    with Progress("reading", 4000, "books", log(), every=60) as progress:
        progress.update(1000, note="loss 0.5")
        progress._began = time.monotonic() - 10
        assert re.fullmatch(
            r"reading: 25% \(1,000 of 4,000 books\), (100|99) books/s, loss 0.5, 0:00:30 left", progress.line()
        )


def test_the_last_line_says_that_it_is_done_whatever_the_interval():
    console = log()
    assert list(track(range(3), "reading", 3, "books", console)) == [0, 1, 2]
    assert "(3 of 3 books)" in lines(console)[-1] and "done in 0:00:00" in lines(console)[-1]


def test_a_failure_is_no_end():
    console = log()
    try:
        with Progress("reading", 10, "books", console):
            raise KeyError
    except KeyError:
        pass
    assert "done" not in lines(console)[-1]


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress("reading", 2, "books", console) as progress:
        progress.update(advance=2, note="quickly")
    text = console.file.getvalue()
    assert "━" in text and "100%" in text and "quickly" in text and "of 2 books" not in text


def test_nothing_is_shown_where_nothing_is_wanted():
    console = log()
    with Progress("reading", 2, "books", console, shown=False, every=0.01) as progress:
        progress.update(advance=1)
        time.sleep(0.05)
    assert lines(console) == []


def test_plain_lines_come_at_least_every_fifteen_seconds_and_no_command_shows_progress_otherwise():
    assert EVERY_S <= 15
    package = Path(opd_ext.__file__).parent
    others = [path for path in package.rglob("*.py") if "rich.progress" in path.read_text()]
    assert others == [package / "progress.py"]
