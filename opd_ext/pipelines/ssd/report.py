# SPDX-License-Identifier: Apache-2.0
"""The report of an SSD run: what was sampled, what it did, and where it did it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from opd_ext.report.arms import by_difficulty, compare_models, png
from opd_ext.report.pages import Section, write_pages


def write_report(
    folder: Path,
    decodings: Mapping[str, Any],
    notes: Mapping[str, dict[str, Any]],
    scores: Mapping[str, pd.DataFrame],
    difficulty: pd.Series,
    diagnosis: pd.DataFrame | None,
    console: Console | None = None,
) -> None:
    """Print the tables and write ``report.{md,html,json}`` with figures.

    Args:
        decodings: arm -> temperature, top_k, top_p of its samples.
        notes: arm -> counts of its samples.
        scores: model (``base`` and every arm) -> grades.
        difficulty: of the reported problems, by uid.
        diagnosis: of :func:`opd_ext.pipelines.ssd.lockfork.measure`.
    """
    records, evaluation = compare_models(scores, "base")
    sections = [_samples(decodings, notes), evaluation]
    if (groups := by_difficulty(scores, difficulty)) is not None:
        sections.append(groups)
    points = temperature_products(decodings, scores)
    sections.append(_products(points))
    if diagnosis is not None:
        sections.append(_locks_and_forks(diagnosis))
    everything = {"evaluation": records, "samples": dict(notes), "temperatures": points.to_dict(orient="records")}
    write_pages(folder, "SSD: simple self-distillation", sections, everything, console)


def _samples(decodings: Mapping[str, Any], notes: Mapping[str, dict[str, Any]]) -> Section:
    head = ["arm", "T_train / top-k / top-p", "samples", "stubs dropped", "short dropped", "truncated", "mean tokens"]
    rows = [
        [
            arm,
            str(decodings[arm]),
            *(str(notes[arm].get(key, 0)) for key in ("samples", "stubs", "short", "truncated")),
            f"{notes[arm]['mean_tokens']:.1f}",
        ]
        for arm in decodings
    ]
    text = (
        "One sample per prompt of the frozen model. Dropped are empty responses, one-line stubs, and as short ones the "
        "share drop_shortest of all."
    )
    return Section("Samples", text, head, rows)


def temperature_products(decodings: Mapping[str, Any], scores: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """pass@1 (percent) of every arm at every temperature: ``arm, T_train, T_eval, product, truncated, accuracy``.

    The problems are the selection problems, where there are any: the reported ones are looked at once.
    """
    rows = []
    for name, table in scores.items():
        decoding = decodings.get(name)
        split = "select" if (table["split"] == "select").any() else "report"
        for temperature, group in table[table["split"] == split].groupby("temperature"):
            t_train = 1.0 if decoding is None else decoding.temperature
            cut = decoding is not None and (decoding.top_k > 0 or decoding.top_p < 1)
            rows.append([name, t_train, temperature, t_train * temperature, cut, 100 * group["acc"].mean()])
    return pd.DataFrame(rows, columns=["arm", "T_train", "T_eval", "product", "truncated", "accuracy"])


def quadratic_fit(product: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients (highest first) and R^2 of accuracy as a quadratic in the product of temperatures."""
    coefficients = np.polyfit(product, accuracy, 2)
    residual = accuracy - np.polyval(coefficients, product)
    spread = accuracy - accuracy.mean()
    return coefficients, float(1 - (residual @ residual) / (spread @ spread)) if spread @ spread else float("nan")


def _products(points: pd.DataFrame) -> Section:
    grid = points.pivot(index="arm", columns="T_eval", values="accuracy").reindex(points["arm"].unique())
    rows = [[arm, *(f"{value:.1f}" for value in values)] for arm, values in grid.iterrows()]
    untruncated = points[~points["truncated"] & (points["arm"] != "base")]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, group in points.groupby("arm", sort=False):
        axes.plot(group["product"], group["accuracy"], marker="o", markersize=4, label=arm)
    text = "pass@1 on the problems that temperatures are chosen on, by temperature of evaluation."
    if len(untruncated["product"].unique()) > 3:
        coefficients, r2 = quadratic_fit(untruncated["product"].to_numpy(), untruncated["accuracy"].to_numpy())
        xs = np.linspace(untruncated["product"].min(), untruncated["product"].max(), 100)
        axes.plot(xs, np.polyval(coefficients, xs), linestyle="--", color="gray", label=f"quadratic, R² {r2:.2f}")
        text += f" A quadratic in T_train x T_eval explains {100 * r2:.0f} % of the arms without truncation"
        peak = -coefficients[1] / (2 * coefficients[0]) if coefficients[0] < 0 else None
        text += f" and peaks at {peak:.2f}." if peak is not None and xs[0] <= peak <= xs[-1] else "."
    axes.set(xlabel="T_train x T_eval", ylabel="pass@1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    head = ["arm", *(f"T_eval {temperature:g}" for temperature in grid.columns)]
    return Section("Temperatures", text, head, rows, png(figure))


def _locks_and_forks(diagnosis: pd.DataFrame) -> Section:
    head = ["arm", "states", "-log mass on support", "kept mass %", "top token %", "entropy", "alignment"]
    rows = []
    for (arm, kind), group in diagnosis.groupby(["arm", "kind"], sort=False):
        before, after = (group[group["model"] == model].iloc[0] for model in ("base", "arm"))
        if not before["states"]:
            continue

        def moved(key: str, factor: float, digits: int, before=before, after=after) -> str:
            # An exact 0 comes out of the logarithms as +-1e-9; adding 0 takes the sign off.
            values = (round(factor * states[key], digits) + 0.0 for states in (before, after))
            return " -> ".join(f"{value:.{digits}f}" for value in values)

        rows.append(
            [
                f"{arm}, {kind}s",
                str(int(before["states"])),
                moved("support", 1, 4),
                moved("kept_mass", 100, 2),
                moved("top", 100, 2),
                moved("entropy", 1, 4),
                moved("alignment", 1, 4),
            ]
        )
    text = (
        "States of the base's own text, base -> arm: at a lock one token has 80 % of the base's top 20, at a fork "
        "several share it. Cutting the tail shows as mass on the support, spreading as entropy; nats without a unit."
    )
    return Section("Locks and forks", text, head, rows)
