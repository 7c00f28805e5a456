# SPDX-License-Identifier: Apache-2.0
"""Several methods, several seeds, one table and one figure: what helps, by how much, at what cost.

Intervals are 95 % percentile bootstrap with two sources of uncertainty: problems, drawn jointly for all methods
(comparisons are paired), and training seeds, drawn for each method. Three seeds say little about their own spread; the
interval then errs on the narrow side, which is why the seeds' extremes stand beside it.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table

from opd_ext.files import write_whole
from opd_ext.report.bootstrap import LEVEL, SEED
from opd_ext.report.run_report import Run, load_run
from opd_ext.terminal import LOG_WIDTH, terminal

RESAMPLES = 4_000
_PROBLEM = ["data_source", "index"]
_TAIL = [50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL)]


@dataclass(frozen=True)
class Arm:
    """The runs of one method: per-problem results of every validation, ``[seeds, problems]`` each.

    ``accuracy`` and ``tokens`` map step -> array; ``costs`` are means over the runs.
    """

    name: str
    seeds: list[int]
    accuracy: dict[int, np.ndarray]
    tokens: dict[int, np.ndarray]
    costs: dict[str, float]

    @property
    def last(self) -> int:
        return max(self.accuracy)

    def curve(self) -> list[tuple[int, float]]:
        """(step, mean accuracy over seeds and problems)."""
        return [(step, float(values.mean())) for step, values in sorted(self.accuracy.items())]

    def steps_to(self, accuracy: float) -> float:
        """Training step at which the curve first reaches ``accuracy``, interpolated; inf if it never does."""
        curve = self.curve()
        if curve[0][1] >= accuracy:
            return float(curve[0][0])
        for (a, low), (b, high) in zip(curve, curve[1:], strict=False):
            if low < accuracy <= high:
                return a + (b - a) * (accuracy - low) / (high - low)
        return math.inf


def load_arms(folder: Path) -> list[Arm]:
    """All runs below ``folder``, grouped by ``opd.method`` and ``opd.control``.

    Raises:
        FileNotFoundError: no run there.
        ValueError: runs that cannot be compared: other problems or steps of validation, or a run without its last one.
    """
    runs = [load_run(log.parent) for log in sorted(Path(folder).glob("*/metrics.jsonl"))]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run folders: start the runs first, or name their parent")
    configs = [OmegaConf.create(run.config) for run in runs]
    expected, problems = None, None
    members: dict[str, list[tuple[int, Run, dict, dict]]] = {}
    for run, config in zip(runs, configs, strict=True):
        tables = {step: per_problem(run, step) for step in run.validations}
        expected = expected or list(tables)
        if list(tables) != expected:
            raise ValueError(
                f"{run.directory} validated at steps {list(tables)}, others at {expected}: let it finish, or remove it"
            )
        found = tables[expected[-1]].index
        problems = found if problems is None else problems
        if not found.equals(problems):
            raise ValueError(f"{run.directory} was validated on other problems than the runs before it")
        accuracy = {step: table["acc"].to_numpy() for step, table in tables.items()}
        tokens = {step: table["response_tokens"].to_numpy() for step, table in tables.items()}
        # Else a control's runs would pass for seeds of the method.
        control = config.opd.control if "control" in config.opd else None
        name = f"{config.opd.method}, {control}" if control else config.opd.method
        members.setdefault(name, []).append((int(config.opd.seed), run, accuracy, tokens))
    return [make_arm(name, sorted(of_method, key=lambda member: member[0])) for name, of_method in members.items()]


def per_problem(run: Run, step: int) -> pd.DataFrame:
    frame = run.generations(step)
    numbers = frame[["acc", "response_tokens"]].astype(float)
    return frame[_PROBLEM].join(numbers).groupby(_PROBLEM).mean().sort_index()


def make_arm(name: str, members: list[tuple[int, Run, dict, dict]]) -> Arm:
    steps = list(members[0][2])
    costs = pd.DataFrame([_costs(run) for _, run, _, _ in members]).mean().to_dict()
    return Arm(
        name,
        [seed for seed, *_ in members],
        {step: np.stack([accuracy[step] for _, _, accuracy, _ in members]) for step in steps},
        {step: np.stack([tokens[step] for _, _, _, tokens in members]) for step in steps},
        costs,
    )


def _costs(run: Run) -> dict[str, float]:
    train = run.metrics[run.metrics["phase"] == "train"]

    def column(name: str) -> pd.Series:
        return train[name].dropna().astype(float) if name in train else pd.Series(dtype=float)

    entropy = column("opd/student_entropy") if "opd/student_entropy" in train else column("actor/entropy")
    divergence = column("opd/divergence")
    return {
        "entropy": entropy.tail(5).mean(),
        "divergence": divergence.tail(5).mean() if len(divergence) else math.nan,
        "generated": (column("rollout/samples") * column("rollout/tokens_mean")).sum() / 1000,
        "seconds": column("timing_s/step").sum(),
        "annotator_calls": column("annotation/calls").sum(),
    }


def resampled(values: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of ``[seeds, problems]`` under resampled problems (``counts`` [R, problems]) and seeds: [R]."""
    by_seed = values @ counts.T / counts.shape[1]
    drawn = rng.integers(len(values), size=(counts.shape[0], len(values)))
    return np.take_along_axis(by_seed.T, drawn, axis=1).mean(axis=1)


def compare(arms: Sequence[Arm], pairs: Sequence[tuple[str, str]] = ()) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of all methods and the table of differences.

    Args:
        arms: from :func:`load_arms`.
        pairs: (method, baseline) to compare; others than those that exist are refused.

    Returns:
        One row per method: ``method``, ``seeds``, ``step``, accuracy and tokens at the last validation with ``_low``
        and ``_high`` (percent, tokens), the extremes of the seeds' accuracies, and costs. One row per pair: differences
        of final accuracy (points), of the mean accuracy over the run, and of tokens, with intervals, and the steps to
        the baseline's final accuracy.

    Raises:
        ValueError: a pair names a method without runs.
    """
    by_name = {arm.name: arm for arm in arms}
    if missing := [name for pair in pairs for name in pair if name not in by_name]:
        raise ValueError(f"there is no run of {missing[0]}: name methods of {', '.join(by_name)}")
    rng = np.random.default_rng(SEED)
    problems = next(iter(arms[0].accuracy.values())).shape[1]
    counts = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
    draws, rows = {}, []
    for arm in arms:
        final, length = arm.accuracy[arm.last], arm.tokens[arm.last]
        area = np.mean([values for step, values in arm.accuracy.items() if step], axis=0)
        draws[arm.name] = [resampled(values, counts, rng) for values in (100 * final, 100 * area, length)]
        rows.append(
            {
                "method": arm.name,
                "seeds": len(arm.seeds),
                "step": arm.last,
                **with_bounds("accuracy", 100 * final.mean(), draws[arm.name][0]),
                "seed_min": 100 * final.mean(axis=1).min(),
                "seed_max": 100 * final.mean(axis=1).max(),
                **with_bounds("tokens", length.mean(), draws[arm.name][2]),
                **arm.costs,
            }
        )
    differences = []
    for name, baseline in pairs:
        ours, theirs = by_name[name], by_name[baseline]
        row = {"method": name, "baseline": baseline}
        for i, key in enumerate(("accuracy", "area", "tokens")):
            values = draws[name][i] - draws[baseline][i]
            row |= with_bounds(key, float(values.mean()), values)
        target = theirs.curve()[-1][1]
        row |= {"target": 100 * target, "steps": ours.steps_to(target), "baseline_steps": theirs.steps_to(target)}
        differences.append(row)
    return pd.DataFrame(rows), pd.DataFrame(differences)


def with_bounds(key: str, value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(draws, _TAIL)
    return {key: float(value), f"{key}_low": float(low), f"{key}_high": float(high)}


def draw(arms: Sequence[Arm]) -> bytes:
    """PNG: validation accuracy and tokens over the training step, mean over seeds with the seeds' extremes."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = zip(
        figure.subplots(1, 2), ("accuracy", "tokens"), ("correct responses (%)", "tokens per response"), strict=True
    )
    for axes, quantity, label in panels:
        for arm in arms:
            values = getattr(arm, quantity)
            steps = sorted(values)
            factor = 100 if quantity == "accuracy" else 1
            of_seeds = factor * np.stack([values[step].mean(axis=1) for step in steps])
            (line,) = axes.plot(steps, of_seeds.mean(axis=1), marker="o", markersize=3, label=arm.name)
            axes.fill_between(steps, of_seeds.min(axis=1), of_seeds.max(axis=1), color=line.get_color(), alpha=0.12)
        axes.set(xlabel="training step", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def markdown(table: pd.DataFrame, differences: pd.DataFrame) -> str:
    """Both tables for a README."""
    heads = "method|seeds|accuracy %|seeds' range|tokens|entropy|divergence|1k tokens|seconds|annotator calls".split(
        "|"
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for _, row in table.iterrows()]
    if len(differences):
        heads = (
            "method - baseline|accuracy, points|over the run, points|tokens|baseline's final %|reached at step".split(
                "|"
            )
        )
        lines += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(_difference_cells(row)) + " |" for _, row in differences.iterrows()]
    return "\n".join(lines) + "\n"


def _cells(row: pd.Series) -> list[str]:
    return [
        row["method"],
        str(row["seeds"]),
        _interval(row, "accuracy"),
        f"{row['seed_min']:.1f} to {row['seed_max']:.1f}",
        _interval(row, "tokens"),
        f"{row['entropy']:.3f}",
        "-" if math.isnan(row["divergence"]) else f"{row['divergence']:.4f}",
        f"{row['generated']:.0f}",
        f"{row['seconds']:.0f}",
        f"{row['annotator_calls']:.0f}",
    ]


def _difference_cells(row: pd.Series) -> list[str]:
    reached = [f"{row[key]:.0f}" if math.isfinite(row[key]) else "never" for key in ("steps", "baseline_steps")]
    return [
        f"{row['method']} - {row['baseline']}",
        _interval(row, "accuracy", "+"),
        _interval(row, "area", "+"),
        _interval(row, "tokens", "+"),
        f"{row['target']:.1f}",
        f"{reached[0]} (baseline: {reached[1]})",
    ]


def _interval(row: pd.Series, key: str, sign: str = "") -> str:
    value, low, high = (format(row[f"{key}{end}"], f"{sign}.1f") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def write_comparison(folder: Path, pairs: Sequence[tuple[str, str]] = (), console: Console | None = None) -> None:
    """Print both tables and write ``comparison.{md,json,png}`` into ``folder``; each file appears whole.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_arms` and :func:`compare`.
    """
    arms = load_arms(folder)
    table, differences = compare(arms, pairs)
    console = console or terminal(LOG_WIDTH)
    text = markdown(table, differences)
    for block in text.split("\n\n"):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n"))
        shown = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
        for name in head:
            shown.add_column(name)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    records = {"methods": table.to_dict(orient="records"), "differences": differences.to_dict(orient="records")}
    write_whole(Path(folder) / "comparison.md", text.encode())
    write_whole(Path(folder) / "comparison.json", json.dumps(finite(records), indent=2).encode())
    write_whole(Path(folder) / "comparison.png", draw(arms))
    console.print(f"Written: {Path(folder) / 'comparison'}.{{md,json,png}}", soft_wrap=True, highlight=False)


def finite(value):
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
