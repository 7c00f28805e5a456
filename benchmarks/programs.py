# SPDX-License-Identifier: Apache-2.0
"""What a graded test costs: a sandbox of its own against the bare interpreter, and against verl's grader of programs.

    python benchmarks/programs.py --repeats 30

The overhead is that of one test over ``python -I -S program.py < input``. verl's grader (``prime_code``) forks this
process and a manager for every call; it is asked as its own reward function asks it, one test at a time.
"""

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
from pathlib import Path

from measure import RESULTS, provenance, timed, write_json
from verl.utils.reward_score.prime_code.utils import check_correctness

from opd_ext.rewards.code import compute_score
from opd_ext.rewards.code.find import candidates, faults
from opd_ext.rewards.code.sandbox import Job, interpreter

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
TEST = {"inputs": ["1 2\n"], "outputs": ["3\n"]}


def cpu_seconds() -> float:
    """Of this process and of all that it has waited for, which other work on the machine does not change."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(repeats: int = 30, tests: int = 40, date: str = "", out: Path = RESULTS / "programs_cpu.json") -> dict:
    """Milliseconds of one test per arm, interleaved, and of a right program on ``tests`` tests."""
    sandboxes = {box.name: box for box in candidates() if "no /proc" not in box.name and not faults(box)}
    many = {name: values * tests for name, values in TEST.items()}
    graded = f"```python\n{PROGRAM}```"
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(PROGRAM)
        file.flush()
        bare = [interpreter(), "-I", "-S", file.name]
        arms = {
            "bare interpreter": lambda: subprocess.run(
                bare, input=b"1 2\n", stdout=subprocess.PIPE, env={}, check=True
            ),
            **{name: lambda box=box: box.run(Job(PROGRAM, "1 2\n")) for name, box in sandboxes.items()},
            "verl prime_code": lambda: check_correctness({**TEST}, PROGRAM, timeout=6, debug=False),
        }
        for call in arms.values():
            call()
        times, work = {name: [] for name in arms}, {name: [] for name in arms}
        for _ in range(repeats):
            for name, call in arms.items():
                before = cpu_seconds()
                times[name].append(1e3 * timed(call, "cpu"))
                work[name].append(1e3 * (cpu_seconds() - before))
    together = {
        "sandbox": timed(lambda: compute_score("", graded, json.dumps(many)), "cpu"),
        "verl prime_code": timed(lambda: [check_correctness({**TEST}, PROGRAM, 6, False) for _ in range(tests)], "cpu"),
    }
    overhead = {
        name: [ours - plain for ours, plain in zip(times[name], times["bare interpreter"], strict=True)]
        for name in sandboxes
    }
    result = {
        **provenance("cpu", date, "verl"), "repeats": repeats, "tests": tests,
        "milliseconds_median": {name: round(statistics.median(found), 1) for name, found in times.items()},
        "milliseconds_fastest": {name: round(min(found), 1) for name, found in times.items()},
        "cpu_milliseconds_median": {name: round(statistics.median(found), 1) for name, found in work.items()},
        "overhead_milliseconds_median": {name: round(statistics.median(found), 1) for name, found in overhead.items()},
        "overhead_milliseconds_fastest": {
            name: round(min(times[name]) - min(times["bare interpreter"]), 1) for name in sandboxes
        },
        "seconds_of_all_tests": {name: round(seconds, 2) for name, seconds in together.items()},
    }  # fmt: skip
    write_json(out, result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tests", type=int, default=40)
    parser.add_argument("--date", default="")
    parser.add_argument("--out", type=Path, default=RESULTS / "programs_cpu.json")
    print(json.dumps(main(**vars(parser.parse_args())), indent=2))
