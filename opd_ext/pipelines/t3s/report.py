# SPDX-License-Identifier: Apache-2.0
"""The report of a T3S run: the dip, what was selected at it, and what the second run made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from opd_ext.report.arms import by_difficulty, compare_models, png, training_losses
from opd_ext.report.pages import Section, write_pages


def trajectory_lines(curve: pd.DataFrame) -> list[str]:
    """The pilot's checkpoints as lines of text."""
    return [
        f"  step {int(row.step):4d}  accuracy on training prompts {100 * row.accuracy:5.1f} +- "
        f"{100 * row.standard_error:.1f} %  tokens {row.tokens:6.1f}  truncated {100 * row.truncated:4.1f} %"
        for row in curve.itertuples()
    ]


def write_report(
    folder: Path,
    curve: pd.DataFrame,
    bottleneck: Mapping[str, Any],
    selection: Mapping[str, Any],
    losses: Mapping[str, list[tuple[int, float]]],
    scores: Mapping[str, pd.DataFrame],
    difficulty: pd.Series,
    diffusion: Mapping[str, pd.DataFrame] | None,
    restored: float | None,
    console: Console | None = None,
) -> None:
    """Print the tables and write ``report.{md,html,json}`` with figures.

    Args:
        curve: step, accuracy, standard_error, truncated, tokens of the pilot's checkpoints on its training prompts.
        bottleneck: step, dip, noise.
        selection: of :func:`~opd_ext.pipelines.t3s.selection.selection_statistics`, and the fractions below the base by
            step.
        losses: model -> (step, training loss).
        scores: model -> grades.
        diffusion: the same for masked-diffusion models, if there were any.
        restored: share of the response tokens that these always restore under T3S.
    """
    records, evaluation = compare_models(scores, "base")
    sections = [_trajectory(curve, bottleneck, selection), _selected(selection, bottleneck), evaluation]
    everything = {
        "trajectory": curve.to_dict(orient="records"),
        "bottleneck": dict(bottleneck),
        "selection": dict(selection),
        "evaluation": records,
    }
    if (groups := by_difficulty(scores, difficulty)) is not None:
        sections.append(groups)
    sections.append(training_losses(losses))
    if diffusion:
        records, section = compare_models(diffusion, "base")
        section.title = "Masked-diffusion model"
        section.text += f" {100 * restored:.1f} % of the response tokens are always restored under t3s and random."
        sections.append(section)
        everything["diffusion"] = records
    write_pages(folder, "T3S: training-trajectory-aware token selection", sections, everything, console)


def _trajectory(curve: pd.DataFrame, bottleneck: Mapping[str, Any], selection: Mapping[str, Any]) -> Section:
    below = {int(step): value for step, value in selection["fraction_below_base_by_step"].items()}
    rows = [
        [
            str(int(row.step)),
            f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}",
            f"{row.tokens:.1f}",
            f"{100 * row.truncated:.1f}",
            f"{100 * below[int(row.step)]:.1f}" if int(row.step) in below else "-",
        ]
        for row in curve.itertuples()
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(curve["step"], 100 * curve["accuracy"], 100 * curve["standard_error"], marker="o", label="accuracy")
    axes.plot(list(below), 100 * np.array(list(below.values())), marker=".", linestyle="--", label="tokens below base")
    axes.axvline(bottleneck["step"], color="gray", linewidth=1)
    axes.set(xlabel="step of the pilot", ylabel="%")
    axes.grid(alpha=0.3)
    axes.legend()
    text = (
        f"Accuracy on the training prompts by generation (± standard error). Bottleneck: step {bottleneck['step']}, "
        f"{100 * bottleneck['dip']:.1f} points below the base (noise {100 * bottleneck['noise']:.1f})."
    )
    head = ["step", "accuracy %", "tokens", "truncated %", "tokens below base confidence %"]
    return Section("Pilot", text, head, rows, png(figure))


def _selected(selection: Mapping[str, Any], bottleneck: Mapping[str, Any]) -> Section:
    rows = [
        [
            kind,
            str(count),
            f"{selection[f'mean_delta_{key}']:+.3f}",
            f"{100 * selection[f'mean_base_prob_{key}']:.1f}",
        ]
        for kind, key, count in (
            ("kept (yet to learn)", "kept", selection["kept"]),
            ("anchors, left out", "anchor", selection["tokens"] - selection["kept"]),
        )
    ]
    text = (
        f"{100 * selection['anchor_fraction']:.1f} % of the response tokens are anchors; "
        f"{100 * selection['near_zero_fraction']:.1f} % changed by less than 0.001 nats, where rounding decides; the "
        f"end of the response is an anchor in {100 * selection['eos_anchor_fraction']:.1f} % of the traces."
    )
    return Section("Selection", text, ["tokens", "number", "mean change, nats", "mean base probability %"], rows)
