# SPDX-License-Identifier: Apache-2.0
"""``opd t3s``: pilot, bottleneck, selection, second run, and the controls beside it.

    prompts-train -> sample-teacher -> traces -> train-pilot -> score -> bottleneck -> confidence -> select
        -> train-ARM (t3s, inverse, random, lowest), rrt -> evaluate-MODEL

Plain fine-tuning (`sft`) is the pilot's last checkpoint: same data, order, optimiser and steps as every arm.
"""

import json
from pathlib import Path

import pandas as pd

from opd_ext.pipelines.stages import Pipeline
from opd_ext.pipelines.steps import REFUSALS
from opd_ext.pipelines.t3s import diffusion as diffusion_pipeline
from opd_ext.pipelines.t3s import report as t3s_report
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.pipelines.t3s.steps import CHOICE, CURVE, RRT, SELECTION, T3S
from opd_ext.pipelines.traces import TRACES
from opd_ext.tokens.finetuning import read_metrics

BASE, PLAIN = "base", "sft"


def build(config: T3SConfig, seen: bool = True) -> tuple[Pipeline, T3S]:
    """The stages of a run, and what they share; ``seen``: see :class:`~opd_ext.pipelines.steps.Steps`."""
    steps = T3S(config, seen)
    stages = [steps.render("train", config.prompts), *steps.trace_stages()]
    stages.append(steps.train("pilot", steps.pilot, ["traces"], steps.pilot.saved_steps))
    stages += [steps.score_stage(), steps.bottleneck_stage(), steps.confidence_stage(), steps.selection_stage()]
    tasks = {arm: steps.fine_tuning(arm, TRACES, flags=f"masks/{arm}.parquet") for arm in config.arms}
    stages += [steps.train(arm, task, ["traces", "select"]) for arm, task in tasks.items()]
    if config.rrt:
        stages.append(steps.rrt_stage())
    models = evaluated(steps, config)
    stages += steps.evaluation_stages(models)
    if config.diffusion is not None and seen:  # its stages rest on what the config of its model says
        stages += diffusion_pipeline.stages(steps, config, TRACES)
    return Pipeline(Path(config.run_dir), stages, REFUSALS), steps


def evaluated(steps: T3S, config: T3SConfig) -> dict[str, tuple[str, str | None]]:
    """Every model that is compared: its path, and the stage that makes it."""
    models: dict[str, tuple[str, str | None]] = {
        BASE: (config.model, None),
        PLAIN: (str(steps.pilot.final), "train-pilot"),
    }
    if config.rrt:
        models[RRT] = (str(steps.folder / RRT), "rrt")
    return models | {arm: (str(steps.fine_tuning(arm, TRACES).final), f"train-{arm}") for arm in config.arms}


def write_report(config: T3SConfig, pipeline: Pipeline, steps: T3S) -> None:
    """Print the report of a finished run and write it into ``report/``."""
    trained = {PLAIN: "pilot", **{arm: arm for arm in config.arms}}
    losses = {
        name: [(entry["step"], entry["train/loss"]) for entry in read_metrics(steps.folder / "train" / folder)]
        for name, folder in trained.items()
    }
    t3s_report.write_report(
        steps.folder / "report",
        pd.read_parquet(steps.folder / CURVE),
        json.loads((steps.folder / CHOICE).read_text()),
        json.loads((steps.folder / SELECTION).read_text()),
        losses,
        {model: steps.scores(model) for model in evaluated(steps, config)},
        steps.difficulties,
        diffusion_pipeline.scores(steps) if config.diffusion else None,
        pipeline.record("select-diffusion").get("notes", {}).get("fraction"),
    )
