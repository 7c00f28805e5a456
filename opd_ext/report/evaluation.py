# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found: accuracy in its readings, lengths, and two models problem by problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from opd_ext.estimators import majority, pass_at_k
from opd_ext.report.arms import png
from opd_ext.report.bootstrap import estimate, holm, resampled_means, sign_flip_p
from opd_ext.report.pages import Section

Grades = Mapping[str, Mapping[str, pd.DataFrame]]
"""Model -> set -> one row per sample: uid, acc, acc_*, tokens, truncated, vote, data_source, difficulty."""

AVERAGE = "average of the sets"
SIGNIFICANT = 0.05
_READ = ["acc", "pass", "maj", "tokens", "truncated"]  # of a problem
_COLUMNS = ("accuracy", *_READ[1:])  # what they are called in a record


def sections(grades: Grades) -> tuple[list[Section], dict[str, Any]]:
    """The tables and figures of an evaluation, and the numbers behind them.

    Intervals are 95 %, percentile bootstrap over problems. With two models, the second is the one compared with.
    """
    records = [record for model, sets in grades.items() for record in accuracies(model, sets)]
    found = [_accuracy_section(records)]
    numbers: dict[str, Any] = {"accuracy": records}
    if len(grades) == 2:
        numbers["comparison"] = comparison(*grades.values())
        found.append(_comparison_section(list(grades), numbers["comparison"]))
    if curves := pass_curves(grades):
        numbers["pass"] = curves
        found.append(_pass_section(curves))
    for section, key in ((_difficulty_section(grades), "difficulty"), (_verdict_section(grades), "verdicts")):
        if section is not None:
            numbers[key] = [dict(zip(section.head, row, strict=True)) for row in section.rows]
            found.append(section)
    return found, numbers


def accuracies(model: str, sets: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One record per set, per data source of a set that has several, and the average where there are several sets."""
    records, whole = [], []
    for name, grades in sets.items():
        table = per_problem(grades)
        values = table[_READ].to_numpy()
        means = resampled_means(values)
        whole.append((values.mean(axis=0), means))
        records.append(_record(model, name, table, values, means))
        of_source = table["data_source"]
        if of_source.nunique() > 1:
            for source in sorted(of_source.unique()):
                part = table[of_source == source]
                values = part[_READ].to_numpy()
                records.append(_record(model, f"{name}: {source}", part, values, resampled_means(values)))
    if len(whole) > 1:
        value = np.mean([mean for mean, _ in whole], axis=0)
        # Sets are drawn apart from each other: another order of the resamples for each.
        shuffled = [np.random.default_rng(i).permutation(means) for i, (_, means) in enumerate(whole)]
        averages = np.mean(shuffled, axis=0)
        record = {
            "model": model,
            "set": AVERAGE,
            "problems": sum(r["problems"] for r in records if ":" not in r["set"]),
        }
        records.append(record | {"n": None} | _intervals(value[None, :].repeat(2, axis=0), averages))
    return records


def per_problem(grades: pd.DataFrame) -> pd.DataFrame:
    """``acc``, ``pass``, ``maj`` (with all samples), ``tokens``, ``truncated``, ``n`` and what a problem is, by uid."""
    groups = grades.groupby("uid", sort=True)
    table = groups[["acc", "tokens", "truncated"]].mean()
    table["pass"] = groups["acc"].apply(lambda acc: float((acc >= 1).any()))
    table["maj"] = groups[["vote", "acc"]].apply(lambda rows: majority(list(rows["vote"]), list(rows["acc"])))
    table["votes"] = groups["vote"].apply(lambda votes: any(votes))
    table["cut_right"] = (grades["acc"] * grades["truncated"]).groupby(grades["uid"]).mean()
    table["n"] = groups.size()
    return table.join(groups[["data_source", "difficulty"]].first())


def _record(model: str, name: str, table: pd.DataFrame, values: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    found = {"model": model, "set": name, "problems": len(table), "n": int(table["n"].max())}
    found["of_truncated"] = _of_truncated(table)
    found["votes"] = bool(table["votes"].any())
    return found | _intervals(values, means)


def _of_truncated(table: pd.DataFrame) -> str:
    """The accuracy of the responses that were cut: a ratio of two means, whose interval is over problems as well."""
    values = table[["cut_right", "truncated"]].to_numpy()
    if not values[:, 1].any():
        return "-"
    means = resampled_means(values)
    means = means[means[:, 1] > 0]  # a resample without a cut response says nothing
    value, low, high = estimate(values, means, lambda m: 100 * m[..., 0] / m[..., 1])
    return _cell({"cut": value, "cut_low": None if np.isnan(low) else low, "cut_high": high}, "cut")


def _intervals(values: np.ndarray, means: np.ndarray) -> dict[str, float | None]:
    record: dict[str, float | None] = {}
    for place, column in enumerate(_COLUMNS):
        scale = 1.0 if column == "tokens" else 100.0
        value, low, high = estimate(values, means, _column(place, scale))
        numbers = zip((column, f"{column}_low", f"{column}_high"), (value, low, high), strict=True)
        record |= {key: None if np.isnan(number) else number for key, number in numbers}
    return record


def _column(place: int, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: scale * means[..., place]


def _accuracy_section(records: list[dict[str, Any]]) -> Section:
    head = [
        "model",
        "set",
        "problems",
        "n",
        "mean@n %",
        "pass@n %",
        "maj@n %",
        "tokens",
        "truncated %",
        "of truncated %",
    ]
    rows = []
    for record in records:
        shown = [*(_cell(record, column) for column in _COLUMNS[:-1]), f"{record['truncated']:.1f}"]
        n = "-" if record["n"] is None else str(record["n"])
        if record["n"] == 1:
            shown[1] = shown[2] = "-"  # one sample passes, votes and is the mean
        if not record.get("votes", True):  # of programs none does
            shown[2] = "-"
        shown.append(record.get("of_truncated", "-"))
        rows.append([record["model"], record["set"], str(record["problems"]), n, *shown])
    text = (
        "Means over problems with 95 % intervals. mean: of n samples; pass: any of them is right; maj: the answer that "
    )
    return Section(
        "Accuracy", text + "most of them give is right; of truncated: of responses cut at the limit.", head, rows
    )


def _cell(record: Mapping[str, Any], column: str, sign: str = "") -> str:
    value, low, high = (record[f"{column}{end}"] for end in ("", "_low", "_high"))
    if low is None:
        return format(value, f"{sign}.1f")
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def comparison(ours: Mapping[str, pd.DataFrame], theirs: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Per set: differences of two models on the same problems, with p-values corrected for the number of sets.

    The p-value is that of the sign-flip test on the problems' differences of mean accuracy.

    Raises:
        ValueError: a set has other problems for one model than for the other.
    """
    records = []
    for name in ours:
        left, right = per_problem(ours[name]), per_problem(theirs[name])
        if not left.index.equals(right.index):
            raise ValueError(f"the two models were evaluated on different problems of {name}")
        values = np.stack([left["acc"], right["acc"], left["tokens"], right["tokens"]], axis=1)
        means = resampled_means(values)
        change = estimate(values, means, lambda m: 100 * (m[..., 0] - m[..., 1]))
        fewer = estimate(values, means, lambda m: 100 * (1 - m[..., 2] / np.maximum(m[..., 3], 1e-9)))
        record: dict[str, Any] = {"set": name, "problems": len(left)}
        for key, found in (("change", change), ("reduction", fewer)):
            names = (key, f"{key}_low", f"{key}_high")
            record |= {each: None if np.isnan(x) else x for each, x in zip(names, found, strict=True)}
        records.append(record | {"p": sign_flip_p(values[:, 0] - values[:, 1])})
    for record, corrected in zip(records, holm([record["p"] for record in records]), strict=True):
        record["p_holm"] = corrected
    return records


def _comparison_section(models: list[str], records: list[dict[str, Any]]) -> Section:
    head = ["set", "problems", "accuracy, points", "p (Holm)", "verdict", "fewer tokens %"]
    rows = []
    for record in records:
        differs = record["p_holm"] < SIGNIFICANT
        verdict = ("better" if record["change"] > 0 else "worse") if differs else "no difference shown"
        shown = [_cell(record, "change", "+"), f"{record['p_holm']:.4f}", verdict, _cell(record, "reduction", "+")]
        rows.append([record["set"], str(record["problems"]), *shown])
    text = f"{models[0]} minus {models[1]}, paired by problem. p: sign-flip test of the mean difference, corrected for "
    return Section(f"{models[0]} against {models[1]}", f"{text}{len(records)} sets by Holm's method.", head, rows)


def pass_curves(grades: Grades) -> list[dict[str, Any]]:
    """pass@k for k = 1, 2, 4, ..., n, unbiased, of every model and set with n > 1 samples."""
    curves = []
    for model, sets in grades.items():
        for name, table in sets.items():
            groups = table.groupby("uid")["acc"]
            counts = [(len(acc), int((acc >= 1).sum())) for _, acc in groups]
            n = min(size for size, _ in counts)
            if n < 2:
                continue
            ks = sorted({1 << power for power in range(n.bit_length()) if 1 << power <= n} | {n})
            values = [100 * float(np.mean([pass_at_k(size, c, k) for size, c in counts])) for k in ks]
            curves.append({"model": model, "set": name, "k": ks, "pass": values})
    return curves


def _pass_section(curves: list[dict[str, Any]]) -> Section:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve["k"], curve["pass"], marker="o", label=f"{curve['model']}, {curve['set']}".replace("$", r"\$"))
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel="pass@k %")
    axes.grid(alpha=0.3)
    axes.legend()
    return Section("pass@k", "Probability that k samples hold a right one (unbiased).", picture=png(figure))


def _difficulty_section(grades: Grades) -> Section | None:
    rows = []
    for model, sets in grades.items():
        for name, table in sets.items():
            problems = per_problem(table)
            levels = problems["difficulty"].dropna()
            for level in sorted(levels.unique(), key=_numbers_first) if levels.nunique() > 1 else ():
                values = problems.loc[problems["difficulty"] == level, ["acc", "tokens"]].to_numpy()
                rows.append([model, name, level, str(len(values)), _mean(values[:, :1], 100), _mean(values[:, 1:])])
    head = ["model", "set", "difficulty", "problems", "mean@n %", "tokens"]
    return Section("By difficulty", "Means over problems with 95 % intervals.", head, rows) if rows else None


def _mean(values: np.ndarray, scale: float = 1.0) -> str:
    """The mean of one column over problems, with its interval."""
    value, low, high = estimate(values, resampled_means(values), _column(0, scale))
    return _cell({"mean": value, "mean_low": None if np.isnan(low) else low, "mean_high": high}, "mean")


def _numbers_first(level: str) -> tuple[bool, float, str]:
    try:
        return False, float(level), level
    except ValueError:
        return True, 0.0, level


def _verdict_section(grades: Grades) -> Section | None:
    """The readings of graders that have several: how much of an accuracy is the grader's leniency."""
    names = sorted(
        {name for sets in grades.values() for table in sets.values() for name in table if name[:4] == "acc_"}
    )
    if not names:
        return None
    rows = []
    for model, sets in grades.items():
        for name, table in sets.items():
            known = table.groupby("uid")[[each for each in ("acc", *names) if each in table]].mean()
            shown = (_mean(known[[each]].to_numpy(), 100) if each in known else "-" for each in ("acc", *names))
            rows.append([model, name, *shown])
    text = "The same responses, read otherwise. acc is what the other tables report."
    return Section("By rule of the grader", text, ["model", "set", "acc %", *(f"{each} %" for each in names)], rows)
