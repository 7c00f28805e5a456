# SPDX-License-Identifier: Apache-2.0
"""``opd ssd``: sample from the model, fine-tune it on its samples, evaluate; every way of sampling is an arm.

    prompts-train -> sample-ARM -> train-ARM -> prompts-report, prompts-select -> evaluate-MODEL -> diagnose

The arm `control` (temperature 1, nothing cut) is mandatory: its target is the model itself, so what it gains is what
comes from fitting one fixed sample per prompt, and not from the method.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from opd_ext.pipelines import problems
from opd_ext.pipelines.ssd import lockfork
from opd_ext.pipelines.ssd import report as ssd_report
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.pipelines.ssd.target import are_short, is_stub
from opd_ext.pipelines.stages import Pipeline, Stage
from opd_ext.pipelines.steps import REFUSALS, Steps
from opd_ext.plan.work import Work
from opd_ext.sampling.config import Decoding
from opd_ext.tokens.tables import SAMPLES, read_table, write_table

BASE = "base"


def all_arms(config: SSDConfig) -> dict[str, Decoding]:
    """The named arms, and one without truncation per temperature of the sweep."""
    return {**config.arms, **{f"sweep-T{t:g}": Decoding(t) for t in config.sweep}}


def build(config: SSDConfig, seen: bool = True) -> tuple[Pipeline, Steps]:
    """The stages of a run, and what they share; ``seen``: see :class:`~opd_ext.pipelines.steps.Steps`."""
    steps, arms = Steps(config, seen), all_arms(config)
    stages = [steps.render("train", config.prompts)]
    stages += [_sampling(steps, config, arm) for arm in arms]
    tasks = {arm: steps.fine_tuning(arm, f"training/{arm}.parquet") for arm in arms}
    stages += [steps.train(arm, task, [f"sample-{arm}"]) for arm, task in tasks.items()]
    models = {BASE: (config.model, None)} | {arm: (str(task.final), f"train-{arm}") for arm, task in tasks.items()}
    stages += steps.evaluation_stages(models)
    if config.diagnose:
        stages.append(_diagnosis(steps, config, {arm: model for arm, (model, _) in models.items()}))
    return Pipeline(Path(config.run_dir), stages, REFUSALS), steps


def _sampling(steps: Steps, config: SSDConfig, arm: str) -> Stage:
    """One response per prompt from the frozen model, and which of them are trained on."""
    jobs = {
        name: steps.job(config.model, None, "train", f"samples/{name}.parquet", decoding, 1, config.max_tokens)
        for name, decoding in all_arms(config).items()
    }

    def run() -> dict[str, Any]:
        if not jobs[arm].done:
            steps.sample(list(jobs.values()), "sampling")
        samples = read_table(Path(jobs[arm].out), SAMPLES)
        texts = problems.decode(samples, steps.tokenizer)
        stubs = np.array([is_stub(text) for text in texts], bool)
        short = np.array(are_short(texts, config.drop_shortest), bool) & ~stubs
        kept = samples[~(stubs | short)]
        write_table(steps.folder / "training" / f"{arm}.parquet", kept, SAMPLES, **jobs[arm].metadata)
        return {
            "samples": len(samples),
            "stubs": int(stubs.sum()),
            "short": int(short.sum()),
            "truncated": int((samples["finish_reason"] == "length").sum()),
            "mean_tokens": float(samples["response_ids"].map(len).mean()),
        }

    settings = steps.sampling_settings(config.model, all_arms(config)[arm], 1, config.max_tokens)
    settings |= {"drop_shortest": config.drop_shortest} if config.drop_shortest else {}
    work: list[Work] = [steps.planned(str(config.model), 1, config.max_tokens)]
    outputs = [f"samples/{arm}.parquet", f"training/{arm}.parquet"]
    return Stage(f"sample-{arm}", run, settings, outputs, ["prompts-train"], work=work)


def _diagnosis(steps: Steps, config: SSDConfig, models: dict[str, str]) -> Stage:
    """What the arms did at locks and forks of the model's own text."""

    def run() -> dict[str, Any]:
        lockfork.measure(
            base=config.model,
            models={arm: model for arm, model in models.items() if arm != BASE},
            decodings=all_arms(config),
            samples=steps.folder / "samples" / "control.parquet",
            count=config.diagnose,
            out=steps.folder / "diagnosis.parquet",
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
        return {}

    after = ["sample-control", *(f"train-{arm}" for arm in models if arm != BASE)]
    arms = len(models) - 1
    mean = min(steps.planned(str(config.model), 1, config.max_tokens).mean, lockfork.LONGEST)
    logits, width = 2 * min(config.max_tokens, lockfork.LONGEST), 4 if config.device == "cpu" else 2
    reads = steps.reading(config.diagnose, mean, 2 * arms, ranks=1, width=width, resident=2, logits=logits)
    return Stage("diagnose", run, {"prompts": config.diagnose}, ["diagnosis.parquet"], after, work=[reads])


def write_report(config: SSDConfig, pipeline: Pipeline, steps: Steps) -> None:
    """Print the report of a finished run and write it into ``report/``."""
    arms = all_arms(config)
    ssd_report.write_report(
        steps.folder / "report",
        arms,
        {arm: pipeline.record(f"sample-{arm}")["notes"] for arm in arms},
        {model: steps.scores(model) for model in (BASE, *arms)},
        steps.difficulties,
        pd.read_parquet(steps.folder / "diagnosis.parquet") if config.diagnose else None,
    )
