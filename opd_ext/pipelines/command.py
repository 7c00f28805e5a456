# SPDX-License-Identifier: Apache-2.0
"""``opd sft``, ``opd ssd`` and ``opd t3s``: settings, stages, report."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from rich.table import Table

from opd_ext.bridge.warm_python import warm_python
from opd_ext.errors import ConfigError
from opd_ext.files import write_whole
from opd_ext.pipelines import problems
from opd_ext.pipelines.graded import check_rows
from opd_ext.pipelines.settings import (
    PipelineConfig,
    PromptsConfig,
    SampledConfig,
    TracedConfig,
    check_inputs,
    check_trainable,
    compose_pipeline,
    missing_inputs,
    plain,
)
from opd_ext.pipelines.sft import pipeline as sft_pipeline
from opd_ext.pipelines.sft.config import SFTConfig
from opd_ext.pipelines.ssd import pipeline as ssd_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.pipelines.stages import Pipeline
from opd_ext.pipelines.t3s import pipeline as t3s_pipeline
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.plan.machines import GiB
from opd_ext.plan.stages import Place
from opd_ext.plan.stages_page import WIDTH, PlannedStage, StagesPlan
from opd_ext.report.after import after_run
from opd_ext.terminal import terminal

_PIPELINES = {
    "sft": (SFTConfig, sft_pipeline),
    "ssd": (SSDConfig, ssd_pipeline),
    "t3s": (T3SConfig, t3s_pipeline),
}


def run(
    name: str,
    overrides: Sequence[str],
    until: str | None,
    only: str | None,
    force: str | None,
    dry_run: bool,
    cfg: bool,
    config_dirs: Sequence[Path] = (),
    as_json: bool = False,
) -> None:
    """Run what is left of a pipeline, and write its report once all of it is there.

    Args:
        name: ``sft``, ``ssd`` or ``t3s``.
        until, only, force: names of stages, see :meth:`opd_ext.pipelines.stages.Pipeline.run`.
        dry_run: print the stages and what is done, or, where inputs are not here, what is missing, and stop.
        cfg: print the configuration and stop.
        config_dirs: folders with further recipes and presets.
        as_json: of a dry run, print the plan alone, as plain values.

    Raises:
        ConfigError, LaunchError, MergeError, StageError, TableError: one sentence each.
    """
    config, module = compose(name, overrides, config_dirs), _PIPELINES[name][1]
    if cfg:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return
    console = terminal(WIDTH)
    check_trainable(config)
    if dry_run and (missing := _missing(config)):
        pipeline = module.build(config, seen=False)[0]
        if as_json:
            print(json.dumps(planned(config, pipeline, seen=False).as_json(), indent=2))
            return
        console.print(f"run folder: {config.run_dir}", soft_wrap=True, highlight=False)
        console.print(overview(pipeline, "not looked at"))
        planned(config, pipeline, seen=False).print(console)
        told = "; ".join(sentence.rstrip(".") for sentence in missing)
        console.print(f"Missing here, so nothing was looked at: {told}.", soft_wrap=True, highlight=False)
        return
    _check(config)
    pipeline, steps = module.build(config)
    if dry_run and as_json:
        print(json.dumps(planned(config, pipeline).as_json(), indent=2))
        return
    console.print(f"run folder: {config.run_dir}", soft_wrap=True, highlight=False)
    if dry_run:
        console.print(overview(pipeline))
        planned(config, pipeline).print(console)
        return
    work(config, pipeline, until, only, force)
    if all(state == "done" for _, state, _ in pipeline.overview()):
        again = shlex.join(["opd", name, *overrides, *(f"--config-dir={folder}" for folder in config_dirs)])
        after_run(lambda: module.write_report(config, pipeline, steps), again)


def work(
    config: SampledConfig,
    pipeline: Pipeline,
    until: str | None = None,
    only: str | None = None,
    force: str | None = None,
) -> None:
    """Run what is left of the stages; ``config.yaml`` says with what, since it was accepted and ran."""
    # On the CPU a pipeline's processes, one after the other, are forked from one that has imported the stack.
    busy = any(state != "done" for _, state, _ in pipeline.overview())
    with warm_python(config.device == "cpu" and busy, {name: str(value) for name, value in config.environment.items()}):
        pipeline.run(until, only, force)
    write_whole(Path(config.run_dir) / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def compose(name: str, overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> PipelineConfig:
    """The settings of a pipeline, as :func:`~opd_ext.pipelines.settings.compose_pipeline` makes them."""
    return compose_pipeline(name, _PIPELINES[name][0], overrides, config_dirs)


def _check(config: PipelineConfig) -> None:
    """What would otherwise come out after hours."""
    check_inputs(config)
    problems.load_grader(config.reward)
    problems.check_columns(
        config.prompts.file, isinstance(config, TracedConfig) and not config.traces_column, bool(config.prompts.wording)
    )
    wording = config.prompts.wording if config.evaluate.wording is None else config.evaluate.wording
    graded = [config.prompts] if isinstance(config, TracedConfig) and not config.traces_column else []
    for file in filter(None, (config.evaluate.file, config.evaluate.select_file)):
        problems.check_columns(file, graded=True, worded=bool(wording))
        graded.append(PromptsConfig(file=file, count=config.evaluate.count, deduplicate=False))
    for settings in graded:
        check_rows(str(settings.file), problems.read_problems(settings), lambda _: config.reward)


def _missing(config: PipelineConfig) -> list[str]:
    """What a run would need and is not here: files, folders, or the tokenizer of a model of the hub."""
    if found := missing_inputs(config):
        return found
    try:
        problems.load_tokenizer(str(config.model), config.trust_remote_code)
    except ConfigError as error:
        return [str(error)]
    return []


def planned(config: SampledConfig, pipeline: Pipeline, seen: bool = True) -> StagesPlan:
    """Memory, seconds and disk of the stages; ``seen``: what is done has been looked at."""
    done = {name for name, state, _ in pipeline.overview() if state == "done"} if seen else set()
    stages = [PlannedStage(name, name in done, work) for name, work in pipeline.work.items()]
    cache = float(config.environment.get("VLLM_CPU_KVCACHE_SPACE", 0)) * GiB
    return StagesPlan(stages, Place(config.device, config.plan, plain(config.vllm), cache))


def overview(pipeline: Pipeline, said: str = "") -> Table:
    """The stages, what became of each (or what is ``said`` of all), and what each waits for."""
    table = Table("stage", "state", "after")
    for name, state, after in pipeline.overview():
        table.add_row(name, said or state, ", ".join(after))
    return table
