# SPDX-License-Identifier: Apache-2.0
"""What a run achieved: the first validation against the last, as numbers, a verdict, curves and a page."""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from rich import box
from rich.console import Console
from rich.table import Table

from opd_ext.alarms.record import read as read_alarms
from opd_ext.checkpoints.layout import export_command
from opd_ext.files import read_jsonl, write_whole
from opd_ext.report.bootstrap import LEVEL, RESAMPLES, SEED, estimate, resampled_means
from opd_ext.report.curves import draw_curves
from opd_ext.terminal import LOG_WIDTH, terminal

EXAMPLES = 6
REGRESSIONS = 4
_PROBLEM = ["data_source", "index"]
_REQUIRED = {"data_source", "acc", "response_tokens"}


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        directory: the folder; its name is the experiment's.
        config: text of ``config.yaml``, empty if the run has none.
        metrics: one row per line of ``metrics.jsonl``, sorted by step; of a step that a resumed run repeated,
            the later line.
        validations: step -> file of the samples evaluated there, in ascending order of the step.
    """

    directory: Path
    config: str
    metrics: pd.DataFrame
    validations: dict[int, Path]

    def generations(self, step: int) -> pd.DataFrame:
        """The samples evaluated at that step, one row each; ``index`` and ``difficulty`` as :func:`_tidy` has them.

        Raises:
            ValueError: the file is empty, broken, or lacks a column that the comparison needs.
        """
        path = self.validations[step]
        frame = pd.DataFrame(read_jsonl(path))
        missing = sorted(_REQUIRED - set(frame.columns))
        if missing:
            columns = ", ".join(missing)
            raise ValueError(f"{path} has no {columns}: it is empty or no validation dump")
        optional = {"index": None, "difficulty": None, "truncated": False, "sample": 0, "input": "", "output": ""}
        return _tidy(frame.assign(**{key: value for key, value in optional.items() if key not in frame.columns}))


def load_run(run_dir: str | Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no ``metrics.jsonl``.
        ValueError: a line is not JSON (only the last line of ``metrics.jsonl`` may be cut off, by a kill).
    """
    directory = Path(run_dir)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no run folder {directory}: check the path or start the run first")
    log = directory / "metrics.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"{directory} is no run folder: it holds no metrics.jsonl")
    metrics = pd.DataFrame(read_jsonl(log, cut_off_end=True))
    if not metrics.empty:
        metrics = metrics.drop_duplicates(["phase", "step"], keep="last").sort_values("step", kind="stable")
    config = directory / "config.yaml"
    dumps = {
        int(found[1]): path
        for path in directory.glob("generations/val_*.jsonl")
        if (found := re.fullmatch(r"val_(\d+)\.jsonl", path.name))
    }
    return Run(
        directory=directory,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        metrics=metrics.reset_index(drop=True),
        validations=dict(sorted(dumps.items())),
    )


def before_after(run_dir: str | Path) -> pd.DataFrame:
    """Compare the first validation of a run with its last, paired by problem.

    Samples of a problem are averaged first, so every problem weighs the same; only problems present in both
    dumps count. Intervals are 95 % percentile bootstrap over problems with a fixed seed, the same resamples
    for every column of a group (:mod:`opd_ext.report.bootstrap`).

    Returns:
        One row per group: ``all``, then each data source if there are several, then each difficulty. Columns:
        ``group``, ``problems``, ``samples_before``, ``samples_after``; and, each with ``_low`` and ``_high``:
        ``accuracy_before``, ``accuracy_after`` (percent), ``accuracy_change`` (points, after minus before),
        ``tokens_before``, ``tokens_after``, ``tokens_change`` (tokens per response),
        ``tokens_reduction_pct`` (1 - after / before, in percent; positive is shorter),
        ``truncated_before``, ``truncated_after`` (percent).
        ``attrs`` holds ``first_step`` and ``last_step``.

    Raises:
        FileNotFoundError: no run folder, or fewer than two validation dumps.
        ValueError: a broken dump, or two dumps without a common problem.
    """
    return _compare(*_first_and_last(load_run(run_dir)))


def verdict(table: pd.DataFrame) -> str:
    """One sentence, computed from the row ``all`` of :func:`before_after`."""
    row = table.iloc[0]
    fewer, low, high = (0.0 - row[f"tokens_reduction_pct{end}"] for end in ("", "_high", "_low"))
    tokens = _direction(row, "tokens_change", "fewer", "more", "not significantly different")
    points, points_low, points_high = (row[f"accuracy_change{end}"] for end in ("", "_low", "_high"))
    accuracy = _direction(row, "accuracy_change", "lower", "higher", "not significantly lower")
    sentence = f"tokens {fewer:+.1f} % [{low:+.1f}, {high:+.1f}]: {tokens}"
    if math.isfinite(points):  # of data without reference answers there is no accuracy
        sentence += f"; accuracy {points:+.1f} points [{points_low:+.1f}, {points_high:+.1f}]: {accuracy}"
    scope = f"steps {table.attrs['first_step']} to {table.attrs['last_step']}, {row.problems} problems"
    return f"{sentence} (95 % intervals, paired by problem; {scope})"


def write_report(run_dir: str | Path, console: Console | None = None) -> None:
    """Print the comparison and write ``report/{summary.json, curves.png, report.html}`` into the run folder.

    A report is derived from the run, so an older one is replaced; each file appears whole or not at all.

    Raises:
        FileNotFoundError, ValueError: as :func:`before_after`.
    """
    run = load_run(run_dir)
    first, last = _first_and_last(run)
    table = _compare(first, last)
    sentence = verdict(table)
    console = console or terminal(LOG_WIDTH)
    console.print(comparison_table(table, title=run.directory.resolve().name))
    console.print(sentence, soft_wrap=True, highlight=False)

    found = read_alarms(run.directory)
    for record in found:
        console.print(f"ALARM at {record}", soft_wrap=True, highlight=False)

    png = draw_curves(run.metrics, [record.step for record in found])
    page = Environment(loader=PackageLoader("opd_ext.report"), autoescape=True).get_template("report.html.j2")
    html = page.render(
        name=run.directory.resolve().name,
        verdict=sentence,
        table=table,
        steps=table.attrs,
        png=base64.b64encode(png).decode("ascii"),
        config=run.config,
        words=_words,
        alarms=found,
        export=export_command(run.directory),
        **_side_by_side(first[1], last[1]),
    )
    summary = {
        "run": run.directory.resolve().name,
        **table.attrs,
        "verdict": sentence,
        "alarms": [asdict(record) for record in found],
        "interval": {
            "level": LEVEL,
            "method": "percentile bootstrap, paired by problem",
            "resamples": RESAMPLES,
            "seed": SEED,
        },
        "comparison": [{key: _plain(value) for key, value in row.items()} for row in table.to_dict(orient="records")],
    }
    folder = run.directory / "report"
    folder.mkdir(exist_ok=True)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    write_whole(folder / "curves.png", png)
    write_whole(folder / "report.html", html)
    console.print(f"Report: {folder / 'report.html'}", soft_wrap=True, highlight=False)
    if command := export_command(run.directory):
        console.print(f"Model as a Hugging Face folder: {command}", soft_wrap=True, highlight=False)


def _first_and_last(run: Run) -> list[tuple[int, pd.DataFrame]]:
    steps = list(run.validations)
    if not steps:
        raise FileNotFoundError(
            f"{run.directory} has no validation dump (generations/val_<step>.jsonl): "
            "let the run validate before training and at its end"
        )
    if len(steps) == 1:
        raise FileNotFoundError(
            f"{run.directory} has only one validation dump (step {steps[0]}): "
            "a comparison needs one from before training and one from its end"
        )
    return [(step, run.generations(step)) for step in (steps[0], steps[-1])]


def _compare(first: tuple[int, pd.DataFrame], last: tuple[int, pd.DataFrame]) -> pd.DataFrame:
    sides = [_per_problem(frame) for _, frame in (first, last)]
    paired = sides[0].add_suffix("_before").join(sides[1].add_suffix("_after"), how="inner")
    if paired.empty:
        raise ValueError(f"the validations at steps {first[0]} and {last[0]} have no problem in common")
    groups = {"all": np.ones(len(paired), dtype=bool)}
    sources = paired.index.get_level_values("data_source")
    if sources.nunique() > 1:
        groups |= {str(source): sources == source for source in sorted(sources.unique())}
    difficulty = paired["difficulty_before"]
    groups |= {f"difficulty {_words(level)}": difficulty == level for level in sorted(difficulty.dropna().unique())}
    table = pd.DataFrame([_group_row(name, paired[mask]) for name, mask in groups.items()])
    table.attrs = {"first_step": first[0], "last_step": last[0]}
    return table


def _per_problem(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = {column: frame[column].astype(float) for column in ("acc", "response_tokens", "truncated")}
    grouped = frame[[*_PROBLEM, "difficulty"]].assign(**numbers, samples=1).groupby(_PROBLEM)
    return grouped.agg(
        {
            "acc": "mean",
            "response_tokens": "mean",
            "truncated": "mean",
            "difficulty": "first",
            "samples": "sum",
        }
    )


def _group_row(name: str, problems: pd.DataFrame) -> dict:
    columns = [f"{key}_{side}" for key in ("acc", "response_tokens", "truncated") for side in ("before", "after")]
    values = problems[columns].to_numpy()
    means = resampled_means(values)
    statistics = {
        "accuracy_before": lambda m: 100 * m[..., 0],
        "accuracy_after": lambda m: 100 * m[..., 1],
        "accuracy_change": lambda m: 100 * (m[..., 1] - m[..., 0]),
        "tokens_before": lambda m: m[..., 2],
        "tokens_after": lambda m: m[..., 3],
        "tokens_change": lambda m: m[..., 3] - m[..., 2],
        "tokens_reduction_pct": lambda m: 100 * (1 - m[..., 3] / np.maximum(m[..., 2], 1e-9)),
        "truncated_before": lambda m: 100 * m[..., 4],
        "truncated_after": lambda m: 100 * m[..., 5],
    }
    row = {
        "group": name,
        "problems": len(problems),
        "samples_before": int(problems["samples_before"].sum()),
        "samples_after": int(problems["samples_after"].sum()),
    }
    for key, statistic in statistics.items():
        # Means that cancel leave +-1e-15, which must not turn a tie at zero into a significant change.
        numbers = (round(number, 9) + 0.0 for number in estimate(values, means, statistic))
        row[key], row[f"{key}_low"], row[f"{key}_high"] = numbers
    return row


def _direction(row: pd.Series, key: str, down: str, up: str, neither: str) -> str:
    if math.isnan(row[f"{key}_low"]):
        return "one problem, no interval"
    return (
        f"significantly {down}"
        if row[f"{key}_high"] < 0
        else f"significantly {up}"
        if row[f"{key}_low"] > 0
        else neither
    )


def _side_by_side(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, list[dict]]:
    """Pairs to read: problems spread evenly over the set, and some that were right before and wrong after."""
    first_samples = [frame.sort_values("sample").drop_duplicates(_PROBLEM) for frame in (before, after)]
    pairs = first_samples[0].merge(first_samples[1], on=_PROBLEM, suffixes=("_before", "_after"))
    pairs = pairs.sort_values(["difficulty_before", *_PROBLEM]).reset_index(drop=True)
    spread = np.unique(np.linspace(0, len(pairs) - 1, min(EXAMPLES, len(pairs))).round().astype(int))
    lost = pairs[(pairs["acc_before"] > pairs["acc_after"])].head(REGRESSIONS)
    return {
        "examples": pairs.iloc[spread].to_dict(orient="records"),
        "regressions": lost.to_dict(orient="records"),
    }


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The samples with sources, indices and difficulties that can be grouped, sorted and paired, whatever they were.

    A problem without an index gets a name made of its prompt, the same in every validation, and a number if other
    problems have that prompt. Difficulties stay numbers if all are, else they are words.
    """
    frame = frame.assign(data_source=frame["data_source"].map(_words), input=frame["input"].map(_words))
    prompts = [f"#{sha256(text.encode(errors='replace')).hexdigest()[:8]}" for text in frame["input"]]
    named = pd.Series(prompts, frame.index).str.cat(
        frame.groupby(["data_source", "sample", "input"]).cumcount().astype(str), sep="."
    )
    index, difficulty = frame["index"], frame["difficulty"]
    if index.isna().any() or not pd.api.types.is_numeric_dtype(index):
        index = index.map(_words, na_action="ignore").where(index.notna(), named)
    numbers = pd.to_numeric(difficulty.map(_words, na_action="ignore"), errors="coerce")
    difficulty = difficulty.map(_words, na_action="ignore") if (numbers.isna() & difficulty.notna()).any() else numbers
    return frame.assign(index=index, difficulty=difficulty)


def _words(value: Any) -> str:
    """A name of the data set's, as text."""
    if isinstance(value, float):
        return "none" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return "none" if value is None else str(value)


def _plain(value):
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_table(table: pd.DataFrame, title: str) -> Table:
    """The before/after comparison for a terminal; ``table`` is that of :func:`before_after`."""
    steps = f"step {table.attrs['first_step']} to {table.attrs['last_step']}"
    shown = Table(
        title=f"{title}: {steps}, mean [95 % interval]",
        title_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("group")
    for heading in (
        "problems",
        "accuracy % before",
        "after",
        "change, points",
        "tokens before",
        "after",
        "reduction %",
    ):
        shown.add_column(heading, justify="right")
    for _, row in table.iterrows():
        shown.add_row(
            row["group"],
            str(row["problems"]),
            *(_with_interval(row, key) for key in ("accuracy_before", "accuracy_after")),
            _with_interval(row, "accuracy_change", sign="+"),
            *(_with_interval(row, key) for key in ("tokens_before", "tokens_after", "tokens_reduction_pct")),
        )
    return shown


def _with_interval(row: Mapping, key: str, sign: str = "") -> str:
    """``value`` over ``[low, high]``, one decimal each, for a row of the comparison."""
    if not math.isfinite(row[key]):
        return "-"
    value, low, high = (format(row[f"{key}{end}"], f"{sign}.1f") for end in ("", "_low", "_high"))
    return f"{value}\n[{low}, {high}]"
