# SPDX-License-Identifier: Apache-2.0
"""The curves of a run in one picture: does it get shorter, does it stay right, is the teacher in order?"""

import io
import re
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# panel title, axis label with unit, factor, then metric -> legend
_PANELS = (
    (
        "Accuracy",
        "correct responses (%)",
        100,
        {"rollout/accuracy": "training rollouts", "monitor/accuracy": "monitor", "val/accuracy": "validation"},
    ),
    (
        "Response length",
        "tokens per response",
        1,
        {"rollout/tokens_mean": "training rollouts", "monitor/tokens_mean": "monitor", "val/tokens_mean": "validation"},
    ),
    (
        "Loss and divergence",
        "nats per token",
        1,
        {
            "opd/loss": "loss",
            "opd/divergence": "divergence",
            "opd/divergence_first": "first tokens",
            "opd/divergence_middle": "middle",
            "opd/divergence_last": "last tokens",
        },
    ),
    ("Entropy", "nats per token", 1, {"opd/student_entropy": "student", "opd/teacher_entropy": "teacher"}),
    (
        "Teacher",
        "optimiser steps",
        1,
        {"teacher/version": "version (step of its weights)", "teacher/age": "age"},
    ),
    (
        "Time",
        "seconds per step",
        1,
        {"timing_s/gen": "generation", "timing_s/update_actor": "update", "timing_s/step": "whole step"},
    ),
)


def draw_curves(metrics: pd.DataFrame, alarms: Sequence[int] = ()) -> bytes:
    """PNG of six panels over the training step: accuracy, tokens, loss, entropies, teacher version, time.

    Args:
        metrics: rows of ``metrics.jsonl`` with ``step``. A panel without any logged metric says so. Dotted
            lines in the loss panel mark the steps at which a new teacher starts.
        alarms: steps at which one was raised: a red line through every panel.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    for axes, (title, label, factor, curves) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        axes.set(title=title, xlabel="training step", ylabel=label)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for metric, name in (curves | _of_several(title, metrics)).items():
            _draw(axes, metrics, metric, name, factor)
        if title.startswith("Loss"):
            for step in _refresh_steps(metrics):
                axes.axvline(step, color="grey", linestyle=":", linewidth=1)
        for step in alarms:
            axes.axvline(step, color="red", linestyle="--", linewidth=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color="grey")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def _of_several(title: str, metrics: pd.DataFrame) -> dict[str, str]:
    """What a panel shows of each of several teachers: metric -> legend."""
    kind = {"Loss and divergence": "divergence", "Entropy": "entropy", "Teacher": "age"}.get(title)
    found = {name: re.fullmatch(rf"teacher/([\w-]+)/{kind}", str(name)) for name in metrics.columns} if kind else {}
    return {name: f"{kind}, {match[1]}" for name, match in found.items() if match}


def _draw(axes, metrics: pd.DataFrame, metric: str, name: str, factor: float) -> None:
    if metric not in metrics:
        return
    logged = metrics[["step", metric]].dropna()
    if logged.empty:
        return
    validation = metric.startswith(("val/", "monitor/"))
    axes.plot(
        logged["step"],
        factor * logged[metric].astype(float),
        label=name,
        marker="o" if validation or len(logged) == 1 else None,
        linewidth=2 if validation else 1.2,
        drawstyle="steps-post" if metric.endswith(("/version", "/age")) else "default",
    )


def _refresh_steps(metrics: pd.DataFrame) -> list[int]:
    if "teacher/version" not in metrics:
        return []
    versions = metrics[["step", "teacher/version"]].dropna()
    return versions.loc[versions["teacher/version"].diff() > 0, "step"].tolist()
