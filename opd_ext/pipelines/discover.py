# SPDX-License-Identifier: Apache-2.0
"""Test-time self-distillation: search for one right answer to one question, learning from every failure.

SDPO (arXiv 2601.20802, section 5): sample a few attempts, let feedback teach, sample again; stop at the first success.
A search is a training run on a data set of one question; several seeds make a discovery@k curve.
"""

import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from opd_ext.estimators import discovery_at_k
from opd_ext.files import write_whole
from opd_ext.plan.page import WIDTH
from opd_ext.progress import track
from opd_ext.report.after import after_run
from opd_ext.terminal import terminal

LOG_LINES = 15
REFUSED = 2  # the exit status of `opd train` for input that it refuses


class SearchError(RuntimeError):
    """One sentence: which input is wrong, or which search failed and where its log is."""


def discover(
    data: Path,
    row: int,
    out: Path,
    seeds: int = 5,
    budget: int = 512,
    attempts_per_step: int = 16,
    success: float = 1.0,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> list[int | None]:
    """Search with every seed, one after the other, and report discovery@k.

    A search that has found an answer or spent its budget is not repeated; one that was interrupted goes on where its
    last checkpoint is. ``out`` receives a run folder per seed, ``question.parquet``, ``discovery.json`` and
    ``discovery.png``.

    Args:
        data: a training file in verl's format.
        row: which of its questions, from 0.
        budget: attempts per search, rounded up to whole steps.
        success: score from which an attempt counts as right.
        overrides: of the configuration; the method is ``sdpo`` unless they say otherwise. ``recipe=sdpo/discover`` has
            the published settings of a search.

    Returns:
        Attempt of the first success of each search, or None.

    Raises:
        SearchError: no such row, ``out`` holds another question, or a search failed.
    """
    _check_counts(seeds, budget, attempts_per_step)
    console = console or terminal()
    out = Path(out).absolute()
    question = _write_question(data, row, out)
    steps = math.ceil(budget / attempts_per_step)
    settings = _settings(question, steps, attempts_per_step, success, overrides)
    times: list[int | None] = []
    for seed in track(range(1, seeds + 1), "searching", seeds, "searches", console):
        folder = out / f"seed-{seed}"
        if not _finished(folder, steps):
            _search(folder, [*settings, f"opd.seed={seed}", f"opd.run_dir={folder}"])
        times.append(_outcome(folder)["found"])
    after_run(
        lambda: _report(times, steps * attempts_per_step, out, console), "the same command, which keeps the searches"
    )
    return times


def plan_search(
    data: Path,
    row: int,
    budget: int,
    attempts_per_step: int,
    overrides: Sequence[str] = (),
    seeds: int = 1,
    as_json: bool = False,
) -> None:
    """Check one search as a run is checked and print what it would do; no search is started, no folder made.

    The plan is of one search that spends its whole budget; ``seeds`` of them follow each other.

    Raises:
        SearchError, ConfigError: one sentence.
    """
    from opd_ext.config.overrides import from_words
    from opd_ext.train import plan

    _check_counts(seeds, budget, attempts_per_step)
    with tempfile.TemporaryDirectory() as folder:
        question = _write_question(data, row, Path(folder))
        steps = math.ceil(budget / attempts_per_step)
        plan(from_words(_settings(question, steps, attempts_per_step, 1.0, overrides), []), as_json=as_json)
    if not as_json:
        said = f"The plan is of one search, which ends with its first success; {seeds} of them follow each other."
        terminal(WIDTH).print(said, highlight=False, soft_wrap=True)


def _check_counts(seeds: int, budget: int, attempts_per_step: int) -> None:
    if seeds < 1 or budget < 1 or attempts_per_step < 1:
        raise SearchError("seeds, budget and attempts per step must each be at least 1.")


def _settings(question: Path, steps: int, attempts: int, success: float, overrides: Sequence[str]) -> list[str]:
    """What makes a training run a search, and then the user's overrides."""
    method = () if any(override.startswith(("method=", "recipe=")) for override in overrides) else ("method=sdpo",)
    return [
        *method,
        f"data.train_files={question}",
        f"data.val_files={question}",
        "data.train_batch_size=1",
        f"actor_rollout_ref.rollout.n={attempts}",
        f"opd.stop_on_success={success}",
        f"trainer.total_training_steps={steps}",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        "trainer.max_actor_ckpt_to_keep=1",
        *overrides,
    ]


def _write_question(data: Path, row: int, out: Path) -> Path:
    try:
        frame = pd.read_parquet(data)
    except (ValueError, OSError) as error:
        said, *_ = str(error).split("\n")
        raise SearchError(f"{data} cannot be read as parquet ({said}).") from None
    if not 0 <= row < len(frame):
        raise SearchError(f"{data} has rows 0 to {len(frame) - 1}; there is no row {row}.")
    buffer = io.BytesIO()
    frame.iloc[[row]].to_parquet(buffer, index=False)
    path = out / "question.parquet"
    if path.exists() and path.read_bytes() != buffer.getvalue():
        raise SearchError(f"{out} holds searches for another question: choose another folder.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
    return path


def _outcome(folder: Path) -> dict:
    path = folder / "discovery.json"
    return json.loads(path.read_text()) if path.exists() else {"attempts": 0, "found": None, "step": 0}


def _finished(folder: Path, steps: int) -> bool:
    outcome = _outcome(folder)
    return outcome["found"] is not None or outcome["step"] >= steps


def _search(folder: Path, settings: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "search.log"
    with log.open("a") as output:
        done = subprocess.run([sys.executable, "-m", "opd_ext.train", *settings], stdout=output, stderr=output)
    if done.returncode == REFUSED:  # nothing was started, and one sentence says why
        refusal = log.read_text().strip().split("\n")[-1]
        raise SearchError(refusal.removeprefix("opd train: "))
    if done.returncode:
        last = "\n".join(log.read_text().strip().split("\n")[-LOG_LINES:])
        raise SearchError(f"the search in {folder} failed with status {done.returncode}; the end of {log}:\n{last}")


def _report(times: list[int | None], budget: int, out: Path, console: Console) -> None:
    ks = sorted({*(2**i for i in range(int(math.log2(budget)) + 1)), budget})
    curve = {k: discovery_at_k(times, k) for k in ks}
    table = Table(title=f"discovery@k over {len(times)} searches", title_justify="left")
    for k in ks:
        table.add_column(str(k), justify="right")
    table.add_row(*(f"{100 * value:.0f} %" for value in curve.values()))
    console.print(table)
    shown = ", ".join("none" if time is None else str(time) for time in times)
    console.print(f"first success at attempt: {shown} (budget {budget})", highlight=False)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.step(ks, [100 * value for value in curve.values()], where="post", marker="o")
    axes.set(xscale="log", xlabel="attempts k", ylabel="discovery@k (%)", ylim=(0, 105))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(out / "discovery.png", picture.getvalue())
    record = {"budget": budget, "first_success": times, "discovery_at_k": curve}
    write_whole(out / "discovery.json", json.dumps(record, indent=2).encode())
    console.print(f"Written: {out / 'discovery'}.{{json,png}}", soft_wrap=True, highlight=False)
