# SPDX-License-Identifier: Apache-2.0
"""How long a browser takes to open the token credit map of many rollouts, and to find one of them.

    python benchmarks/credit_map.py runs/crisp-cpu_tiny --rollouts 10000

The signals of some rollouts of a run are computed and written again and again until there are enough; headless Chromium
opens that map anew each time, from a file, with an empty cache.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from measure import provenance, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # the browser is that of the tests

from opd_ext import recorded
from opd_ext.inspection.command import prepare, run_config, write
from opd_ext.inspection.methods import Weights, checkpoint
from tests.unit.inspection.browser import PROGRAM, browser

DRAWN = "typeof current !== 'undefined' && current !== null && document.querySelector('.item') !== null"


def make(run: Path, step: str | None, methods: list[str], distinct: int, rollouts: int, out: Path) -> None:
    """The map of so many rollouts: ``distinct`` of the run, and these again and again."""
    config = run_config(run)
    steps, rows = recorded.steps(run), []
    for each in steps:
        rows += [{**row, "step": each} for row in recorded.read(run, each)] if len(rows) < distinct else []
    look = prepare(rows, Weights(run, checkpoint(run, step), config), config, methods, None, "cpu")
    found = [(rows[i], own, signals) for i, own, signals in look.survey(distinct)]
    write(look, islice(cycle(found), rollouts), out)


async def measure(page: Path) -> dict[str, float]:
    """Seconds until the first rollout is drawn, until a search has its answer, until the last rollout is drawn."""
    async with browser() as tab:
        opened = await tab.open(page, DRAWN)
        total = await tab.ask("INDEX.rollouts")
        begun = time.monotonic()
        await tab.ask("$('search').value = INDEX.labels[1][0].toLowerCase(); select()")
        await tab.until(f"state.texts !== null && state.shown.length < {total}")
        searched = time.monotonic() - begun
        await tab.ask("$('search').value = ''; select()")
        begun = time.monotonic()
        await tab.ask(f"go({total} - 1)")
        await tab.until(f"state.at === {total} - 1 && state.shown.length === {total}")
        jumped = time.monotonic() - begun
        assert tab.errors == [], tab.errors
    return {"open": opened, "search": searched, "jump": jumped}


def main(
    run: Path, rollouts: int, distinct: int, methods: list[str], step: str | None, repeats: int, date: str, out: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "map"
        make(run, step, methods, min(distinct, rollouts), rollouts, page)
        files = [path for path in page.rglob("*") if path.is_file()]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        seconds = [asyncio.run(measure(page / "index.html")) for _ in range(repeats)]
    result = {
        **provenance("cpu", date, "transformers"),
        "browser": subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.strip(),
        "rollouts": rollouts,
        "distinct": min(distinct, rollouts),
        "methods": methods,
        "files": len(files),
        "megabytes": round(megabytes, 1),
        "seconds": {name: [round(each[name], 3) for each in seconds] for name in seconds[0]},
        "seconds_median": {name: round(statistics.median(each[name] for each in seconds), 3) for name in seconds[0]},
    }
    write_json(out, result)
    print(json.dumps(result["seconds_median"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--distinct", type=int, default=256, help="rollouts whose signals are computed")
    parser.add_argument("--methods", type=lambda words: words.split(","), default=["crisp", "opsd", "sdpo"])
    parser.add_argument("--step", help="whose weights; the newest checkpoint by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--date", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "credit_map.json")
    main(**vars(parser.parse_args()))
