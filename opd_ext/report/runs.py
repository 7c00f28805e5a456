# SPDX-License-Identifier: Apache-2.0
"""``opd ls``: the runs of a folder, how far they are and what they take."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from opd_ext.alarms.record import read as read_alarms
from opd_ext.run_state import FINISHED, STOPPED, state_of
from opd_ext.terminal import LOG_WIDTH, terminal

DEPTH = 3  # folders of runs in folders of runs
_CONFIG, _METRICS, _MANIFEST = "config.yaml", "metrics.jsonl", "manifest.json"


@dataclass(frozen=True)
class Listed:
    """A run folder at a glance.

    Attributes:
        accuracy: share, of the last validation; without one of the last step's rollouts.
        tokens: mean length of a response there.
        monitored: that validation was of the monitor alone.
        alarms: raised so far.
        disk: bytes of all files.
        changed: seconds since the epoch.
    """

    folder: Path
    method: str
    step: int | None
    total: int | None
    accuracy: float | None
    tokens: float | None
    disk: int
    state: str
    changed: float
    monitored: bool = False
    alarms: int = 0


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run folders at or below ``folder``; what lies within a run is not looked at."""
    with os.scandir(folder) as entries:
        inside = list(entries)
    names = {entry.name for entry in inside}
    if _CONFIG in names and names & {_METRICS, "console.log"} or _MANIFEST in names:
        yield folder
        return
    for entry in sorted(inside, key=lambda entry: entry.name):
        if depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from find(Path(entry.path), depth - 1)


def look(folder: Path) -> Listed:
    """Read of a run what a table shows: two lines of the configuration, the end of the metrics, the size of files."""
    disk, changed = _size(folder)
    if (folder / _MANIFEST).is_file():
        return _look_at_pipeline(folder, disk, changed)
    said = _settings(folder / _CONFIG, {"opd": "method", "trainer": "total_training_steps"})
    total = int(said["trainer"]) if said.get("trainer", "").isdecimal() else None
    last = _last_lines(folder / _METRICS)
    train, val, monitor = (last.get(phase, {}) for phase in ("train", "val", "monitor"))
    step = max((line["step"] for line in (train, val, monitor) if line), default=None)
    monitored = bool(monitor) and monitor["step"] > val.get("step", -1)
    source, prefix = (monitor, "monitor") if monitored else (val, "val") if val else (train, "rollout")
    state = state_of(folder) or (FINISHED if total and step is not None and step >= total else STOPPED)
    return Listed(
        folder=folder,
        method=said.get("opd", ""),
        step=step,
        total=total,
        accuracy=source.get(f"{prefix}/accuracy"),
        tokens=source.get(f"{prefix}/tokens_mean"),
        disk=disk,
        state=state,
        changed=changed,
        monitored=monitored,
        alarms=len(read_alarms(folder)),
    )


def _look_at_pipeline(folder: Path, disk: int, changed: float) -> Listed:
    stages: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    done = sum("outputs" in stage for stage in stages.values())
    state = state_of(folder) or (FINISHED if done == len(stages) else STOPPED)
    return Listed(folder, "pipeline", done, len(stages), None, None, disk, state, changed)


def print_runs(folder: Path) -> None:
    """Print one row per run below ``folder``, the latest change last.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name one that holds runs")
    runs = sorted(map(look, find(folder)), key=lambda run: run.changed)
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("method", "step", "acc %", "tokens", "disk", "state", "changed"):
        table.add_column(name, justify="left" if name in ("method", "state", "changed") else "right", no_wrap=True)
    for run in runs:
        name = folder.name if run.folder == folder else str(run.folder.relative_to(folder))
        step = "-" if run.step is None else str(run.step)
        table.add_row(
            name,
            run.method or "-",
            f"{step}/{run.total}" if run.total else step,
            _number(run.accuracy, 100) + "*" * run.monitored,
            _number(run.tokens, 1) + "*" * run.monitored,
            _bytes(run.disk),
            run.state + (f", {run.alarms} alarm{'s' * (run.alarms > 1)}" if run.alarms else ""),
            f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}",
        )
    table.caption = "* of the monitor's few problems" if any(run.monitored for run in runs) else None
    terminal(LOG_WIDTH).print(table)


def _settings(path: Path, wanted: dict[str, str]) -> dict[str, str]:
    """section -> the value of one key directly below it, of a file that OmegaConf has written; a YAML parser takes
    a hundred times as long."""
    found: dict[str, str] = {}
    section = ""
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").split("\n"):
        if top := re.match(r"(\w+):", line):
            section = top[1]
        elif section in wanted and (value := re.match(rf"  {wanted[section]}: (.*)", line)):
            found[section] = value[1].strip("'\"")
    return found


def _last_lines(path: Path) -> dict[str, dict[str, Any]]:
    """phase -> its last line, read from the end: of training, and of the latest validation, whichever it was."""
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        size = read = file.seek(0, os.SEEK_END)
        block = 1 << 16
        while not ("train" in found and found.keys() & {"val", "monitor"}) and read > 0:
            first = max(0, size - block)
            file.seek(first)
            lines = file.read(size - first).split(b"\n")
            for line in reversed(lines if first == 0 else lines[1:]):
                try:
                    entry = json.loads(line)
                    found.setdefault(entry["phase"], entry)
                except (ValueError, KeyError):  # blank, or cut off by a kill
                    continue
            read, block = first, block * 8
    return found


def _size(folder: Path) -> tuple[int, float]:
    """Bytes of all files below, and when the last of them changed."""
    total, changed = 0, folder.stat().st_mtime
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    below, at = _size(Path(entry.path))
                    total, changed = total + below, max(changed, at)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    total, changed = total + stat.st_size, max(changed, stat.st_mtime)
            except FileNotFoundError:  # a run goes on while it is looked at
                continue
    return total, changed


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.1f}"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
