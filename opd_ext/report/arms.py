# SPDX-License-Identifier: Apache-2.0
"""Models side by side on the same problems: accuracy with paired intervals, temperatures chosen on other problems."""

import io
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from opd_ext.estimators import pass_at_k
from opd_ext.report.bootstrap import estimate, resampled_means
from opd_ext.report.pages import Section

HEAD = ["model", "T_eval", "pass@1 %", "{pass_k} %", "tokens", "truncated %", "pass@1 - {reference}, points"]


def chosen_temperature(scores: pd.DataFrame) -> float:
    """The temperature with the best mean accuracy where temperatures are chosen; the lower one of equals.

    Without a ``select`` split it is the first that was evaluated.
    """
    select = scores[scores["split"] == "select"]
    if not len(select):
        return float(scores["temperature"].iloc[0])
    means = select.groupby("temperature")["acc"].mean().sort_index()
    return float(means.idxmax())


def per_problem(scores: pd.DataFrame, temperature: float, split: str = "report") -> pd.DataFrame:
    """``acc``, ``pass_k``, ``tokens`` and ``truncated`` by ``uid`` (means; pass@k with k = min(n, 5))."""
    rows = scores[(scores["split"] == split) & (scores["temperature"] == temperature)]
    groups = rows.groupby("uid")
    table = groups[["acc", "tokens", "truncated"]].mean()
    table["pass_k"] = groups["acc"].apply(lambda acc: pass_at_k(len(acc), int((acc >= 1).sum()), min(len(acc), 5)))
    return table.sort_index()


def compare_models(scores: Mapping[str, pd.DataFrame], reference: str) -> tuple[list[dict], Section]:
    """One row per model, each at its own chosen temperature, with the difference to ``reference``.

    Intervals are 95 %, percentile bootstrap over problems, paired for differences: they hold the uncertainty of the
    problems, not that of another training seed.

    Args:
        scores: model -> grades with the columns split, temperature, uid, sample, acc, tokens, truncated.
    """
    temperatures = {name: chosen_temperature(table) for name, table in scores.items()}
    tables = {name: per_problem(table, temperatures[name]) for name, table in scores.items()}
    base = tables[reference]
    samples = int(next(iter(scores.values())).groupby(["split", "temperature", "uid"]).size().max())
    records = []
    for name, table in tables.items():
        values = 100 * np.stack([table["acc"], base["acc"].reindex(table.index)], axis=1)
        means = resampled_means(values)
        accuracy, low, high = estimate(values, means, lambda m: m[..., 0])
        difference = estimate(values, means, lambda m: m[..., 0] - m[..., 1])
        records.append(
            {
                "model": name,
                "temperature": temperatures[name],
                "accuracy": accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "pass_k": 100 * float(table["pass_k"].mean()),
                "tokens": float(table["tokens"].mean()),
                "truncated": 100 * float(table["truncated"].mean()),
                **dict(zip(("change", "change_low", "change_high"), difference, strict=True)),
            }
        )
    head = [name.format(pass_k=f"pass@{min(samples, 5)}", reference=reference) for name in HEAD]
    rows = [_cells(record, record["model"] == reference) for record in records]
    if samples == 1:  # pass@1 once is enough
        place = HEAD.index("{pass_k} %")
        head, *rows = ([*row[:place], *row[place + 1 :]] for row in (head, *rows))
    chosen = " at the temperature that was best on the selection problems" if _has_selection(scores) else ""
    text = f"{len(base)} problems, {samples} sample{'s' if samples > 1 else ''} each{chosen}; "
    text += "95 % intervals over problems, differences paired."
    return records, Section("Evaluation", text, head, rows)


def _has_selection(scores: Mapping[str, pd.DataFrame]) -> bool:
    return any((table["split"] == "select").any() for table in scores.values())


def _cells(record: dict, is_reference: bool) -> list[str]:
    change = "{change:+.1f} [{change_low:+.1f}, {change_high:+.1f}]".format(**record)
    return [
        record["model"],
        f"{record['temperature']:g}",
        "{accuracy:.1f} [{accuracy_low:.1f}, {accuracy_high:.1f}]".format(**record),
        f"{record['pass_k']:.1f}",
        f"{record['tokens']:.1f}",
        f"{record['truncated']:.1f}",
        "-" if is_reference else change,
    ]


def by_difficulty(scores: Mapping[str, pd.DataFrame], difficulty: pd.Series) -> Section | None:
    """pass@1 by group of problems, so that a gain in one that is a loss in another is seen; None without groups.

    Args:
        difficulty: by ``uid``, missing values allowed.
    """
    groups = sorted(difficulty.dropna().unique())
    if len(groups) < 2:
        return None
    rows = []
    for name, table in scores.items():
        accuracy = per_problem(table, chosen_temperature(table))["acc"]
        of_group = difficulty.reindex(accuracy.index)
        rows.append([name, *(f"{100 * accuracy[of_group == group].mean():.1f}" for group in groups)])
    sizes = [f"{group} ({int((difficulty == group).sum())})" for group in groups]
    return Section("pass@1 by difficulty", "Number of problems in brackets.", ["model", *sizes], rows)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def training_losses(losses: Mapping[str, list[tuple[int, float]]]) -> Section:
    """Curves of model -> (step, training loss)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", ylabel="training loss, nats per trained token")
    axes.grid(alpha=0.3)
    axes.legend()
    return Section("Training loss", "Each over the tokens that its arm trains.", picture=png(figure))
