# SPDX-License-Identifier: Apache-2.0
"""``opd ssd`` and ``opd t3s``: settings, stages, report."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from opd_ext.offline import problems
from opd_ext.offline.settings import PipelineConfig, SSDConfig, T3SConfig, check_inputs, compose_pipeline
from opd_ext.offline.stages import Pipeline
from opd_ext.offline.steps import Steps
from opd_ext.report.run_report import write_whole


def run_ssd(
    overrides: Sequence[str], until: str | None, only: str | None, force: str | None, dry_run: bool, cfg: bool
) -> None:
    """Run what is left of an SSD pipeline, and write its report once all of it is there."""
    from opd_ext.offline.ssd_pipeline import BASE, all_arms, build
    from opd_ext.report.ssd_report import write_report

    config = compose_pipeline("ssd", SSDConfig, overrides)
    if _only_shows(config, cfg):
        return
    pipeline, steps = build(config)
    if not _run(pipeline, config, until, only, force, dry_run):
        return
    arms = all_arms(config)
    diagnosis = steps.folder / "diagnosis.parquet"
    write_report(
        steps.folder / "report",
        arms,
        {arm: pipeline.record(f"sample-{arm}")["notes"] for arm in arms},
        {model: steps.scores(model) for model in (BASE, *arms)},
        difficulties(steps),
        pd.read_parquet(diagnosis) if config.diagnose else None,
    )


def run_t3s(
    overrides: Sequence[str], until: str | None, only: str | None, force: str | None, dry_run: bool, cfg: bool
) -> None:
    """Run what is left of a T3S pipeline, and write its report once all of it is there."""
    from opd_ext.offline.t3s_pipeline import build, write_report

    config = compose_pipeline("t3s", T3SConfig, overrides)
    if _only_shows(config, cfg):
        return
    pipeline, steps = build(config)
    if _run(pipeline, config, until, only, force, dry_run):
        write_report(config, pipeline, steps)


def _only_shows(config: PipelineConfig, cfg: bool) -> bool:
    if cfg:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return True
    check_inputs(config)
    problems.load_grader(config.reward)
    problems.check_columns(config.prompts.file, graded=isinstance(config, T3SConfig))
    for file in filter(None, (config.evaluate.file, config.evaluate.select_file)):
        problems.check_columns(file, graded=True)
    return False


def _run(
    pipeline: Pipeline, config: PipelineConfig, until: str | None, only: str | None, force: str | None, dry_run: bool
) -> bool:
    """Whether every stage is done now."""
    console = Console()
    console.print(f"run folder: {config.run_dir}", soft_wrap=True, highlight=False)
    if dry_run:
        table = Table("stage", "state", "after")
        for name, state, after in pipeline.overview():
            table.add_row(name, state, ", ".join(after))
        console.print(table)
        return False
    pipeline.run(until, only, force)
    content = OmegaConf.to_yaml(OmegaConf.structured(config))
    write_whole(Path(config.run_dir) / "config.yaml", content.encode())  # of what was accepted and ran
    return all(state == "done" for _, state, _ in pipeline.overview())


def difficulties(steps: Steps) -> pd.Series:
    """`extra_info.difficulty` of the reported problems, by uid; missing where a data set has none."""
    rows = problems.read_problems(steps.splits["report"])
    extra = rows["extra_info"] if "extra_info" in rows else pd.Series([None] * len(rows))
    return pd.Series([(info or {}).get("difficulty") for info in extra], index=rows["uid"])
