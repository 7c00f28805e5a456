# SPDX-License-Identifier: Apache-2.0
"""A method against its controls: which of its gains survives, and which a control has as well.

Every comparison is paired by problem. Intervals are the bootstrap of :mod:`opd_ext.report.compare`, over problems and
seeds; p-values are sign-flip tests over problems, of the seeds' means, corrected together by Holm's method: all arms
and both outcomes are one family. A gain counts as shown if the corrected p-value is below 0.05 *and* the interval does
not hold 0, since the test alone would not see that seeds differ.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from opd_ext.files import write_whole
from opd_ext.report.bootstrap import LEVEL, SEED, holm, sign_flip_p
from opd_ext.report.compare import RESAMPLES, Arm, draw, finite, make_arm, per_problem, resampled, with_bounds
from opd_ext.report.run_report import Run, load_run
from opd_ext.terminal import LOG_WIDTH, terminal

STUDY = "study.json"
METHOD, BASE = "method", "base"
OUTCOMES = {"accuracy": (1, 100.0), "tokens": (-1, 1.0)}
"""Outcome -> the sign of a gain, and the factor to its unit: percent, tokens per response."""


def load_study(folder: Path) -> dict[str, Arm]:
    """Arm -> its runs; ``base`` is what the method's runs were before their first step.

    Raises:
        FileNotFoundError: no study there, or a run of it that is missing.
        ValueError: runs that cannot be compared: validated on other problems, or not to the end.
    """
    path = Path(folder) / STUDY
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {STUDY}: start a study with `opd compare METHOD`")
    study = json.loads(path.read_text())
    arms: dict[str, Arm] = {}
    problems: pd.Index | None = None
    for name in study["arms"]:
        runs = {seed: load_run(Path(folder) / f"{name}-seed{seed}") for seed in study["seeds"]}
        tables = {seed: _validated(run) for seed, run in runs.items()}
        for run, found in zip(runs.values(), tables.values(), strict=True):
            for table in found.values():
                problems = table.index if problems is None else problems
                if not table.index.equals(problems):
                    raise ValueError(f"{run.directory} was validated on other problems than the runs before it")
        arms[name] = _aligned(name, runs, tables)
    method = arms[METHOD]
    if 0 not in method.accuracy:
        raise ValueError(f"the runs of {folder} have no validation before the first step: set val_before_train=true")
    base = Arm(BASE, method.seeds, {0: method.accuracy[0]}, {0: method.tokens[0]}, {})
    return {BASE: base, **arms}


def _validated(run: Run) -> dict[int, pd.DataFrame]:
    if not run.validations:
        raise ValueError(f"{run.directory} has no validation: start the study again to go on with it")
    return {step: per_problem(run, step) for step in run.validations}


def _aligned(name: str, runs: Mapping[int, Run], tables: Mapping[int, dict[int, pd.DataFrame]]) -> Arm:
    """Runs of one arm: the steps that all have, and the last of each, wherever an alarm may have ended it."""
    last = max(max(found) for found in tables.values())
    common = sorted(set.intersection(*(set(found) for found in tables.values())) - {last})
    members = []
    for seed, run in runs.items():
        found = tables[seed]
        shown = {step: found[step] for step in common} | {last: found[max(found)]}
        accuracy = {step: table["acc"].to_numpy() for step, table in shown.items()}
        tokens = {step: table["response_tokens"].to_numpy() for step, table in shown.items()}
        members.append((seed, run, accuracy, tokens))
    return make_arm(name, members)


def judge(arms: Mapping[str, Arm]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of arms and the table of comparisons.

    Returns:
        One row per arm, the base first: ``arm``, ``seeds``, ``step``, ``generated`` (thousands of tokens in the
        rollouts of a run), ``accuracy`` (percent) and ``tokens``, the last two with ``_low`` and ``_high``. One row per
        comparison, each control's and the base's with the method: ``against``,
        ``outcome``, ``difference`` (method minus the other, points or tokens) with bounds, ``p``, ``p_holm``,
        and ``shown``: +1 the method is better, -1 the other is, 0 neither is shown.
    """
    rng = np.random.default_rng(SEED)
    problems = next(iter(arms[METHOD].accuracy.values())).shape[1]
    counts = rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES)
    final = {
        name: {outcome: factor * getattr(arm, outcome)[arm.last] for outcome, (_, factor) in OUTCOMES.items()}
        for name, arm in arms.items()
    }
    draws = {name: {o: resampled(values, counts, rng) for o, values in found.items()} for name, found in final.items()}
    table = [
        {"arm": name, "seeds": len(arm.seeds), "step": arm.last, "generated": arm.costs.get("generated", 0.0)}
        | {k: v for o in OUTCOMES for k, v in with_bounds(o, float(final[name][o].mean()), draws[name][o]).items()}
        for name, arm in arms.items()
    ]
    rows = []
    for outcome in OUTCOMES:
        if not np.isfinite(final[METHOD][outcome]).all():  # of data without reference answers there is no accuracy
            continue
        for name in arms:
            if name == METHOD:
                continue
            by_problem = final[METHOD][outcome].mean(axis=0) - final[name][outcome].mean(axis=0)
            spread = draws[METHOD][outcome] - draws[name][outcome]
            row = {"against": name, "outcome": outcome}
            row |= with_bounds("difference", float(by_problem.mean()), spread)
            rows.append(row | {"p": sign_flip_p(by_problem)})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
        row["shown"] = _shown(row, OUTCOMES[row["outcome"]][0])
    return pd.DataFrame(table), pd.DataFrame(rows)


def _shown(row: Mapping[str, float], sign: int) -> int:
    beyond = row["difference_low"] > 0 or row["difference_high"] < 0
    if row["p_holm"] >= 1 - LEVEL or not beyond:
        return 0
    return 1 if sign * row["difference"] > 0 else -1


def verdicts(comparisons: pd.DataFrame, method: str) -> list[str]:
    """One sentence per outcome: what is gained over the base, and against which controls the gain survives."""
    said = []
    for outcome in OUTCOMES:
        rows = comparisons[comparisons["outcome"] == outcome].set_index("against")
        if rows.empty:
            continue
        base, others = rows.loc[BASE], rows.drop(index=BASE)
        gain = f"{_signed(base)} {'points' if outcome == 'accuracy' else 'tokens'}"
        if base["shown"] <= 0:
            verb = "worse than the base" if base["shown"] < 0 else "no gain over the base is shown"
            said.append(
                f"{outcome}: {verb} ({gain}, p {base['p_holm']:.3f}), so there is nothing for a control to explain."
            )
            continue
        words = {1: "the gain survives", 0: "not shown against", -1: "the control gains more than"}
        parts = []
        for shown, text in words.items():
            names = [f"{_words(name)} ({_signed(row)})" for name, row in others.iterrows() if row["shown"] == shown]
            if names:
                parts.append(f"{text}{f' {method}' if shown < 0 else ''}: {', '.join(names)}")
        rest = "; ".join(parts) if parts else "no control applies"
        said.append(f"{outcome}: {method} gains {gain} over the base (p {base['p_holm']:.3f}); {rest}.")
    return said


def _signed(row: pd.Series) -> str:
    value, low, high = (f"{row[f'difference{end}']:+.1f}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def _words(name: object) -> str:
    return str(name).replace("_", " ")


def tables(table: pd.DataFrame, comparisons: pd.DataFrame) -> list[list[list[str]]]:
    """Both tables as cells, head first."""
    arms = [["arm", "seeds", "last step", "generated, k", "accuracy %", "tokens"]]
    for _, row in table.iterrows():
        accuracy, tokens = (
            f"{row[o]:.1f} [{row[f'{o}_low']:.1f}, {row[f'{o}_high']:.1f}]" if math.isfinite(row[o]) else "-"
            for o in OUTCOMES
        )
        counts = [str(row["seeds"]), str(row["step"]), f"{row['generated']:.1f}"]
        arms.append([_words(row["arm"]), *counts, accuracy, tokens])
    differences = [["method minus", "outcome", "difference", "p", "p, Holm", "method is"]]
    better = {1: "better", 0: "not shown to differ", -1: "worse"}
    for _, row in comparisons.iterrows():
        differences.append(
            [
                _words(row["against"]),
                f"{row['outcome']}, {'points' if row['outcome'] == 'accuracy' else 'per response'}",
                _signed(row),
                f"{row['p']:.4f}",
                f"{row['p_holm']:.4f}",
                better[row["shown"]],
            ]
        )
    return [arms, differences]


def markdown(shown: Sequence[Sequence[Sequence[str]]], said: Sequence[str]) -> str:
    """Verdicts and tables for a README."""
    blocks = ["\n".join(f"* {sentence}" for sentence in said)]
    for head, *rows in shown:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        blocks.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(blocks) + "\n"


def write_study(folder: Path, console: Console | None = None) -> list[str]:
    """Print tables and verdicts, write ``controls.{md,json,png}`` into ``folder``, and return the verdicts.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_study`.
    """
    folder = Path(folder)
    study = json.loads((folder / STUDY).read_text()) if (folder / STUDY).is_file() else {}
    arms = load_study(folder)
    table, comparisons = judge(arms)
    said, shown = verdicts(comparisons, study["method"]), tables(table, comparisons)
    console = console or terminal(LOG_WIDTH)
    for head, *rows in shown:
        printed = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
        for name in head:
            printed.add_column(name)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)
    for sentence in said:
        console.print(sentence, soft_wrap=True, highlight=False)
    if len(study["seeds"]) == 1:
        console.print("One seed: what another seed would do is not in these intervals.", soft_wrap=True)
    records = {name: frame.to_dict(orient="records") for name, frame in (("arms", table), ("against", comparisons))}
    content = {"method": study["method"], "verdicts": said, **records, "not_applicable": study["skipped"]}
    write_whole(folder / "controls.md", markdown(shown, said).encode())
    write_whole(folder / "controls.json", json.dumps(finite(content), indent=2).encode())
    write_whole(folder / "controls.png", draw([arm for name, arm in arms.items() if name != BASE]))
    console.print(f"Written: {folder / 'controls'}.{{md,json,png}}", soft_wrap=True, highlight=False)
    return said
