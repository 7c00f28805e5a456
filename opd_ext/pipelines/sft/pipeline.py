# SPDX-License-Identifier: Apache-2.0
"""``opd sft``: fine-tune a model on traces, and compare it with what it was. It makes teachers and warm starts.

    prompts-train -> sample-teacher -> traces -> train-sft -> prompts-report -> evaluate-base, evaluate-sft

With ``traces_column`` the traces are given; with the model as its own ``teacher`` this is rejection sampling (STaR,
arXiv 2203.14465, without its rationalisation).
"""

from pathlib import Path

from opd_ext.pipelines.sft.config import SFTConfig
from opd_ext.pipelines.stages import Pipeline
from opd_ext.pipelines.steps import REFUSALS
from opd_ext.pipelines.traces import TRACES, TracedSteps
from opd_ext.report.arms import by_difficulty, compare_models, training_losses
from opd_ext.report.pages import write_pages
from opd_ext.tokens.finetuning import read_metrics

BASE, TUNED = "base", "sft"


def build(config: SFTConfig, seen: bool = True) -> tuple[Pipeline, TracedSteps]:
    """The stages of a run, and what they share; ``seen``: see :class:`~opd_ext.pipelines.steps.Steps`."""
    steps = TracedSteps(config, seen)
    task = steps.fine_tuning(TUNED, TRACES)
    stages = [steps.render("train", config.prompts), *steps.trace_stages(), steps.train(TUNED, task, ["traces"])]
    stages += steps.evaluation_stages({BASE: (config.model, None), TUNED: (str(task.final), f"train-{TUNED}")})
    return Pipeline(Path(config.run_dir), stages, REFUSALS), steps


def write_report(config: SFTConfig, pipeline: Pipeline, steps: TracedSteps) -> None:
    """Print the report of a finished run and write it into ``report/``."""
    scores = {model: steps.scores(model) for model in (BASE, TUNED)}
    records, evaluation = compare_models(scores, BASE)
    groups = by_difficulty(scores, steps.difficulties)
    task = steps.fine_tuning(TUNED, TRACES)
    losses = [(entry["step"], entry["train/loss"]) for entry in read_metrics(Path(task.out))]
    traces = pipeline.record("traces")["notes"]
    training = training_losses({TUNED: losses})
    training.text = (
        f"{traces['traces']:,} traces of {traces['prompts']:,} prompts, of {traces['longest']} tokens at most, prompt "
        f"included. The model: {task.final}"
    )
    sections = [evaluation, *([groups] if groups is not None else []), training]
    everything = {"evaluation": records, "traces": traces, "losses": losses, "model": str(task.final)}
    write_pages(steps.folder / "report", "Fine-tuning on traces", sections, everything)
