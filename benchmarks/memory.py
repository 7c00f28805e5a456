# SPDX-License-Identifier: Apache-2.0
"""Memory of a run on a CPU against what `opd plan` says of it.

    python benchmarks/memory.py recipe=crisp/smollm2_cpu              # starts `opd train` with these words
    python benchmarks/memory.py --pid 4711 recipe=crisp/smollm2_cpu   # looks at a run that was started with them

Linux counts for every process the proportional set size (``Pss`` of ``/proc/PID/smaps_rollup``): what it has for
itself, and of what several share, its part. So sizes add up, although processes are forked from one that has imported
the stack. A run is its command and everything below it: driver, Ray, task runner, queue, trainer, vLLM, agent loops,
graders. What is reported is the highest total, who had how much of it at that moment, and the highest of each part.
The trainer is Ray's ``WorkerDict``; the sampler is the largest process that is neither Ray's nor the command.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from measure import RESULTS, provenance, write_json
from rich.table import Table

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.config.overrides import from_words
from opd_ext.plan.memory import machine_uses
from opd_ext.plan.run import read_run
from opd_ext.terminal import terminal

_EVERY_S = 2.0
_PARTS = ("trainer", "sampler", "others")


def below(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def proportional(process: int) -> tuple[str, int]:
    """Title of a process, and its proportional set size in bytes; 0 for one that has ended."""
    try:
        folder = Path(f"/proc/{process}")
        lines = (folder / "smaps_rollup").read_text().split("\n")
        title = (folder / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return "", 0
    return title, next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def parts(root: int) -> dict[str, int]:
    """Bytes of the trainer, of the sampler and of all others, now."""
    sizes = {process: proportional(process) for process in below(root)}
    trainers = {process for process, (title, _) in sizes.items() if title.startswith("ray::WorkerDict")}
    rest = {p: size for p, (title, size) in sizes.items() if p != root and not title.startswith("ray::")}
    sampler = max(rest, key=lambda process: rest[process], default=root) if trainers else root
    found = dict.fromkeys(_PARTS, 0)
    for process, (_, size) in sizes.items():
        part = "trainer" if process in trainers else "sampler" if process == sampler != root else "others"
        found[part] += size
    return found


def watch(root: int, seconds: float) -> dict:
    """The moment of the highest total, and the highest of each part, until the run ends or ``seconds`` are over."""
    began, highest, own, looks = time.monotonic(), dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0), 0
    while time.monotonic() - began < seconds:
        if not proportional(root)[1]:  # it has ended; until its parent asks for its status, its folder is still there
            break
        now = parts(root)
        if sum(now.values()) > sum(highest.values()):
            highest = now
        own = {part: max(size, now[part]) for part, size in own.items()}
        looks += 1
        time.sleep(_EVERY_S)
    return {"at_the_peak": highest, "highest": own, "looks": looks, "seconds": round(time.monotonic() - began)}


def planned(words: Sequence[str]) -> dict[str, float]:
    """The same parts by the plan."""
    config = compose_config(list(from_words(list(words), [])))
    run = read_run(config, check(config))
    if run is None or run.device != "cpu":
        raise typer.BadParameter("the words must be of a run on a CPU, of a model that is here.")
    return machine_uses(run)


def main(
    words: Annotated[list[str], typer.Argument(help="Words of `opd train`.")],
    pid: Annotated[
        int | None, typer.Option(help="A run that was started with them; without it one is started.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to look at most.")] = 3600,
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "memory_cpu.json",
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Measure the memory of a run and compare it with its plan."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    plan = planned(words)
    run = None if pid else subprocess.Popen([sys.executable, "-m", "opd_ext.train", *from_words(words, [])])
    measured = watch(pid or run.pid, seconds)
    if run is not None and run.wait() != 0:
        raise typer.Exit(1)
    result = {**provenance("cpu", date, "verl", "ray"), "words": words, "planned": plan, "measured": measured}
    write_json(out, result)
    show(plan, measured)


def show(plan: dict[str, float], measured: dict) -> None:
    """Print planned and measured, in GiB."""
    shown = Table("part", "planned, GiB", "at the peak", "its own highest", "planned / measured")
    rows = {part: (plan[part], measured["at_the_peak"][part], measured["highest"][part]) for part in _PARTS}
    rows["all"] = (sum(plan.values()), sum(measured["at_the_peak"].values()), None)
    for part, (said, peak, own) in rows.items():
        sizes = ["" if size is None else f"{size / 2**30:.2f}" for size in (said, peak, own)]
        shown.add_row(part, *sizes, f"{said / peak:.0%}" if peak else "")
    terminal().print(shown)


if __name__ == "__main__":
    typer.run(main)
