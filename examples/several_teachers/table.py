# SPDX-License-Identifier: Apache-2.0
"""The student beside each of its teachers, on the test problems of that teacher's family: a table in Markdown.

python examples/several_teachers/table.py runs/specialists 1 2 3      seeds whose evaluations run.sh has made

Differences are paired by problem, after a problem's mean over samples and seeds; intervals are 95 %, percentile
bootstrap over problems (opd_ext/report/bootstrap.py).
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from families import FAMILIES

from opd_ext.report.bootstrap import estimate, resampled_means
from opd_ext.report.evaluation import per_problem


def accuracies(folder: Path, side: str, family: str) -> pd.Series:
    """Mean accuracy of every test problem of a family, by its uid; ``side`` of the evaluation is model or against."""
    return per_problem(pd.read_parquet(folder / "grades" / f"{side}-{family}-test.parquet"))["acc"]


def row(root: Path, family: str, seeds: list[str]) -> list[str]:
    """Cells of one family."""
    folders = [root / f"eval-{seed}-{family}" for seed in seeds]
    sides = [[accuracies(folder, side, family) for folder in folders] for side in ("model", "against")]
    student, teacher = (pd.concat(side, axis=1).mean(axis=1) for side in sides)
    values = np.stack([student, teacher.loc[student.index]], axis=1)
    change = estimate(values, resampled_means(values), lambda m: 100 * (m[..., 0] - m[..., 1]))
    own, its = (f"{100 * each:.1f}" for each in values.mean(axis=0))
    each_seed = [f"{100 * (mine - its_own).mean():+.1f}" for mine, its_own in zip(*sides, strict=True)]
    difference = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*change)
    return [family, str(len(values)), its, own, difference, ", ".join(each_seed)]


def main(root: Path, seeds: list[str]) -> None:
    head = ["family", "problems", "specialist %", "student %", "difference, points", "by seed"]
    rows = [head, ["---"] * len(head), *(row(root, family, seeds) for family in FAMILIES)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["1"])
