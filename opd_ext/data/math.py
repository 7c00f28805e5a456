# SPDX-License-Identifier: Apache-2.0
"""``opd data math``: several published sets of maths in one folder, DAPO-Math-17k, MATH-500 and two AIME.

A comparison with published numbers stands or falls with the rows and the bytes around each question, so both
follow CRISP (arXiv 2603.05433) and its release: the same shuffle and split of the training file, and evaluation
prompts that open like the training prompt but do not repeat the reminder at their end (the teacher's do, there as in
training). ``boxed`` is the wording of the evaluation of IW-OPD (arXiv 2606.22600) instead.

``opd data NAME`` makes each of them, and every other set of :mod:`opd_ext.data.catalogue`, in a folder of its own.
Here a file of copies keeps them, and the name of a file is that of its set.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from opd_ext.context import prompts
from opd_ext.data.catalogue import SETS
from opd_ext.data.prepare import Wording
from opd_ext.data.problems import Tally, divide, read_split
from opd_ext.data.published import Published, Split
from opd_ext.data.rows import PROMPTS, SCHEMA, Problem, row_of
from opd_ext.data.tables import write_tables
from opd_ext.progress import Progress
from opd_ext.terminal import LOG_WIDTH, terminal

__all__ = ["SCHEMA", "SOURCES", "prepare"]

SOURCES = {
    "dapo": replace(SETS["dapo_math_17k"], distinct=""),
    **{name: SETS[name] for name in ("math500", "aime24", "aime25")},
}
TRAINING = "dapo"


class DataSet:
    """Rows of one file to be written, and what became of the rows that were read."""

    def __init__(self, problems: Iterable[Problem], published: Published, split: Split, wording: Wording) -> None:
        self.rows: list[dict] = []
        self.tally = Tally()
        asked, source = wording.asked(published, split), published.data_source + wording.source_label
        for problem in problems:
            if problem.reason:
                self.tally.dropped[problem.reason] += 1
                continue
            self.rows.append(row_of(problem, published, split.name, asked, source))
            self.tally.add(self.rows[-1])


def prepare(
    files: Mapping[str, Path],
    out: Path,
    *,
    val_fraction: float = 0.2,
    prompt: str = "dapo",
    eval_suffix: bool = False,
    teacher_prompt: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Read published files and write one parquet file per data set into ``out``.

    ``dapo`` becomes ``dapo_train`` and ``dapo_val``, every other source a file of its own name. A file that
    is there already with the same content is left alone; nothing is written unless everything can be.

    Args:
        files: source name (a key of ``SOURCES``) -> parquet, JSON, JSON-lines or CSV file.
        out: destination folder.
        val_fraction: share of the shuffled training source that is held out, in [0, 1).
        prompt: wording of the student's prompts: ``dapo``, or ``boxed``, which asks for the answer in a box.
        eval_suffix: close evaluation prompts with the reminder, as training prompts do. The release does not.
        teacher_prompt: instruction id; adds ``<source>_<id>`` files, the evaluation sets as the teacher reads
            them: the baseline that only asks for brevity.
        force: replace files that exist with other content.
        console: where to print.

    Returns:
        The paths of all files.

    Raises:
        ValueError: an option or a source file makes no sense; one sentence.
        FileNotFoundError: a source does not exist.
        FileExistsError: a file exists with other content.
    """
    console = console or terminal(LOG_WIDTH)
    _check(files, val_fraction, prompt, eval_suffix, teacher_prompt)
    wordings = [Wording(prompt, eval_suffix)]
    if teacher_prompt is not None:
        wordings.append(Wording(prompt, teacher_prompt=teacher_prompt))
    data_sets: dict[str, DataSet] = {}
    with Progress("preparing", len(files), "files", console) as progress:
        for name, path in files.items():
            progress.update(note=str(path))
            made = _sets(name, Path(path), val_fraction, wordings, console)
            _refuse_empty(made, path)
            data_sets |= made
            progress.update(advance=1)
        tables = {Path(out) / f"{name}.parquet": _table(data) for name, data in data_sets.items()}
        status = write_tables(tables, force)
    console.print(_summary(data_sets, status))
    for name, data in data_sets.items():
        _tell_copies(name, data.tally, console)
    return list(status)


def _check(
    files: Mapping[str, Path], val_fraction: float, prompt: str, eval_suffix: bool, teacher_prompt: str | None
) -> None:
    if not files:
        raise ValueError(f"nothing to prepare: name at least one of {', '.join('--' + name for name in SOURCES)}.")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction:g} must be at least 0 and below 1.")
    if prompt not in PROMPTS:
        raise ValueError(f"--prompt {prompt} does not exist: choose one of {', '.join(PROMPTS)}.")
    if prompt != "dapo" and (eval_suffix or teacher_prompt is not None):
        option = "--eval-suffix" if eval_suffix else "--teacher-prompt"
        raise ValueError(f"{option} belongs to the wording of DAPO: leave out --prompt {prompt}.")
    if teacher_prompt is not None:
        prompts.instruction(teacher_prompt)
        if set(files) <= {TRAINING}:
            raise ValueError("--teacher-prompt renders evaluation sets: name at least one besides --dapo.")


def _sets(name: str, path: Path, val_fraction: float, wordings: list[Wording], console: Console) -> dict[str, DataSet]:
    """The files that a source becomes."""
    published, tally = replace(SOURCES[name], held_out=val_fraction), Tally()
    problems = list(read_split(published, published.splits[0], path, tally))
    _warn_of_other_file(name, path, tally, console)
    if name != TRAINING:
        split = published.splits[0]
        return {f"{name}{wording.source_label}": DataSet(problems, published, split, wording) for wording in wordings}
    train, val = published.splits
    kept, held = divide(published, problems)
    made = {f"{name}_train": DataSet(kept, published, train, wordings[0])}
    return made | ({f"{name}_val": DataSet(held, published, val, wordings[0])} if held else {})


def _warn_of_other_file(name: str, path: Path, tally: Tally, console: Console) -> None:
    published, found = SOURCES[name].splits[0].origins[0].sha256, tally.sources[0]["sha256"]
    if published and found != published:
        console.print(
            f"WARNING: {path} is not the published file of --{name} (sha256 {found[:12]}..., published "
            f"{published[:12]}...): rows and split may differ from published runs.",
            soft_wrap=True,
            highlight=False,
        )


def _refuse_empty(data_sets: Mapping[str, DataSet], path: Path) -> None:
    if all(data.rows for data in data_sets.values()):
        return
    if not any(data.rows for data in data_sets.values()):
        dropped = sum((data.tally.dropped for data in data_sets.values()), Tally().dropped)
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common())
        raise ValueError(f"{path} has no row that can be used: {reasons}.")
    name = next(name for name, data in data_sets.items() if not data.rows)
    few = "too few questions that can be used to hold some out, so add more or set --val-fraction 0"
    raise ValueError(f"{path} gives no row to {name}: it has {few}.")


def _tell_copies(name: str, tally: Tally, console: Console) -> None:
    if tally.rows > len(tally.answers):
        words = f"WARNING: {name} has {tally.rows:,} rows, {len(tally.answers):,} questions"
        words += f", {len(tally.contested):,} of them with different answers" if tally.contested else ""
        console.print(f"{words}. Copies stay, all on one side of the split.", soft_wrap=True, highlight=False)


def _table(data: DataSet) -> pa.Table:
    return pa.Table.from_pylist(data.rows, schema=SCHEMA)


def _summary(data_sets: Mapping[str, DataSet], status: Mapping[Path, str]) -> Table:
    """``data_sets`` and ``status`` are in the same order."""
    table = Table(title=f"Math data in {next(iter(status)).parent}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("")
    for heading in ("rows", "questions", "prompt characters\nmedian", "\nlongest"):
        table.add_column(heading, justify="right")
    table.add_column("rows dropped")
    for (path, what), data in zip(status.items(), data_sets.values(), strict=True):
        tally, lengths = data.tally, data.tally.lengths or [0]
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in tally.dropped.most_common())
        numbers = (tally.rows, len(tally.answers), int(np.median(lengths)), max(lengths))
        table.add_row(path.name, what, *(f"{number:,}" for number in numbers), reasons or "none")
    return table
