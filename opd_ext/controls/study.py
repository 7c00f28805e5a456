# SPDX-License-Identifier: Apache-2.0
"""The runs of a study, one after another, each an ordinary run in a folder of its own; then the table.

Started again, a study leaves finished runs alone and goes on with the others from their last checkpoint.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from opd_ext.config.overrides import quoted
from opd_ext.controls.arms import METHOD, Arm, Study
from opd_ext.errors import ConfigError, RunError
from opd_ext.files import write_whole
from opd_ext.report.controls import STUDY, write_study
from opd_ext.run_state import FINISHED, state_of
from opd_ext.terminal import LOG_WIDTH, terminal

_REFUSED, _SAYS = 2, "opd train: "
"""Status of a run that was refused before anything was started, and how its sentence begins."""


def print_study(study: Study, console: Console | None = None) -> None:
    """The arms, hours and state of their runs, and why other controls do not apply."""
    console = console or terminal(LOG_WIDTH)
    table = Table(title=f"{study.method} and its controls", title_justify="left", box=box.HORIZONTALS)
    for name in ("arm", "what is other", "runs", "done", "time by the plan"):
        table.add_column(name, overflow="fold", justify="right" if name in ("runs", "done") else "left")
    for arm in study.arms:
        done = sum(is_finished(study, arm, seed) for seed in study.seeds)
        hours = "unknown" if arm.hours is None else _time(arm.hours * len(study.seeds))
        table.add_row(arm.name, _changed(study, arm), str(len(study.seeds)), str(done), hours)
    console.print(table)
    for name, why in study.skipped.items():
        console.print(f"{name} does not apply: {why}", highlight=False, soft_wrap=True)
    if len(study.arms) == 1:
        console.print(f"No control applies to {study.method}: what is left is its gain over the base.", highlight=False)
    known = [arm.hours for arm in study.arms if arm.hours is not None]
    if len(known) == len(study.arms):
        total = sum(known) * len(study.seeds)
        console.print(f"all arms: {_time(total)}, one after another, in {study.folder}", soft_wrap=True)


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _changed(study: Study, arm: Arm) -> str:
    """The places in which an arm differs from the method."""
    method = study.arms[0]
    if arm.name == METHOD:
        return "-"
    found = [f"{name}: {words}" for name, words in arm.places.items() if words != method.places[name]]
    return "; ".join(found) or "no training"


def is_finished(study: Study, arm: Arm, seed: int) -> bool:
    """Whether that run has come to its end; one that an alarm or a collapse ended has."""
    folder = study.run_dir(arm, seed)
    return state_of(folder) == FINISHED and any(folder.glob("generations/val_*.jsonl"))


def run_study(study: Study) -> None:
    """Run what is missing, then print and write the table.

    Raises:
        ConfigError: the folder holds a study with other settings; or a run was refused, of data or a model that is not
            there, say: nothing else is started then.
        RunError: runs that failed, when all others are done.
    """
    _record(study)
    print_study(study)
    failed = [
        f"{arm.name} seed {seed}"
        for seed in study.seeds
        for arm in study.arms
        if not is_finished(study, arm, seed) and not _run(study, arm, seed)
    ]
    if failed:
        raise RunError(
            f"{', '.join(failed)} failed; run.log in their folders below {study.folder} says why. Start the same "
            "command again to go on."
        )
    write_study(study.folder)


def _record(study: Study) -> None:
    """Write down what the study is; its settings must be those of the runs that are there already."""
    path = study.folder / STUDY
    asked = {
        "method": study.method,
        "overrides": list(study.overrides),
        "config_dirs": list(map(str, study.config_dirs)),
    }
    if path.is_file():
        before = json.loads(path.read_text())
        if changed := [key for key in asked if before[key] != asked[key]]:
            key = changed[0]
            raise ConfigError(
                f"{study.folder} holds the runs of {key} {_told(before[key])}, not {_told(asked[key])}: name another "
                "folder with --out, or remove that one."
            )
    study.folder.mkdir(parents=True, exist_ok=True)
    said = asked | {"arms": [arm.name for arm in study.arms], "seeds": list(study.seeds), "skipped": study.skipped}
    write_whole(path, json.dumps(said, indent=2) + "\n")


def _told(value: list[str] | str) -> str:
    return value if isinstance(value, str) else " ".join(value) or "(none)"


def _run(study: Study, arm: Arm, seed: int) -> bool:
    """One run in a process of its own: verl settles its platform once per process. Whether it came to its end.

    Raises:
        ConfigError: it was refused.
    """
    folder = study.run_dir(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*study.overrides, *arm.overrides, f"opd.seed={seed}", f"opd.run_dir={quoted(str(folder))}"]
    for directory in study.config_dirs:
        words += ["--config-dir", str(directory)]
    began = time.monotonic()
    log = folder / "run.log"
    print(f"{arm.name} seed {seed}: started; tail -f {shlex.quote(str(log))}", flush=True)
    with log.open("a") as file:
        status = subprocess.run([sys.executable, "-m", "opd_ext.train", *words], stdout=file, stderr=file).returncode
    if status == _REFUSED:
        raise ConfigError(f"{arm.name} seed {seed} was refused: {_reason(log)}")
    how = "done" if status == 0 else f"FAILED: {_reason(log)}"
    print(f"{arm.name} seed {seed}: {how}, {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def _reason(log: Path) -> str:
    """Why a run ended, in its own last word; where it had none, where to look."""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    return lines[-1].removeprefix(_SAYS) if lines[-1].startswith(_SAYS) else f"see {log}"
