# SPDX-License-Identifier: Apache-2.0
"""``opd eval``: from what was typed to a report."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opd_ext.config.overrides import quoted
from opd_ext.pipelines.command import overview, planned, work
from opd_ext.pipelines.eval.config import EvalConfig
from opd_ext.pipelines.eval.graders import files_of, with_own
from opd_ext.pipelines.eval.models import Evaluated, evaluated
from opd_ext.pipelines.eval.pipeline import Evaluation, build
from opd_ext.pipelines.settings import compose_pipeline
from opd_ext.plan.stages_page import WIDTH
from opd_ext.report.after import after_run
from opd_ext.report.evaluation import sections
from opd_ext.report.pages import write_pages
from opd_ext.terminal import terminal


def run(
    model: str,
    options: Mapping[str, str | None],
    overrides: Sequence[str],
    force: str | None = None,
    dry_run: bool = False,
    cfg: bool = False,
    as_json: bool = False,
) -> None:
    """Evaluate, or go on with an evaluation, and write its report.

    Args:
        model: a run folder, a folder with a model, or a hub id.
        options: key of the settings -> value, None for one that was not given; ``sets`` separated by commas.
        overrides: in Hydra's grammar; they stand above the options.
        force: a stage that is thrown away and done again.
        dry_run: print the stages and what is done, and stop.
        cfg: print the configuration and stop.
        as_json: of a dry run, print the plan alone, as plain values.

    Raises:
        opd_ext.errors.ConfigError, LaunchError, StageError, TableError, CheckpointError: one sentence each.
    """
    given = {name: value for name, value in options.items() if value is not None}
    named = evaluated("model", model, given.get("step"))
    asked = [f"model={quoted(model)}", *_run_defaults(named, "protocol" in given), *map(_override, given.items())]
    if not any(re.match(r"\+*run_dir=", each) for each in overrides):
        name = re.sub(r"[^\w.-]+", "-", named.name).strip("-")
        asked.append(f"run_dir={quoted(str(Path(os.environ.get('OPD_RUNS') or 'runs') / f'eval-{name}'))}")
    config = compose_pipeline("eval", EvalConfig, [*asked, *overrides])
    config.graders = with_own(config.graders, named.config)
    if cfg:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return
    config.check_files()
    pipeline, evaluations = build(config)
    if dry_run and as_json:
        print(json.dumps(planned(config, pipeline).as_json(), indent=2))
        return
    console = terminal(WIDTH)
    console.print(f"run folder: {config.run_dir}", soft_wrap=True, highlight=False)
    if dry_run:
        console.print(overview(pipeline))
        planned(config, pipeline).print(console)
        return
    work(config, pipeline, force=force)
    words = [model, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()), *overrides]
    after_run(lambda: write_report(config, evaluations), shlex.join(["opd", "eval", *words]))


def write_report(config: EvalConfig, evaluations: Mapping[str, Evaluation]) -> None:
    """Print the report of a finished evaluation and write it into ``report/``."""
    names = _distinct([each.model for each in evaluations.values()])
    grades = {
        name: {each: evaluation.grades(each) for each in config.files}
        for name, evaluation in zip(names, evaluations.values(), strict=True)
    }
    found, numbers = sections(grades)
    asked = config.sampling
    decoding = f"temperature {asked.temperature:g}, top-p {asked.top_p:g}, top-k {asked.top_k}"
    found[0].text += f" Sampled with {decoding}, at most {asked.max_tokens} tokens, seed {config.seed}."
    records = {"models": dict(zip(names, (each.model.path for each in evaluations.values()), strict=True)), **numbers}
    write_pages(Path(config.run_dir) / "report", f"Evaluation of {names[0]}", found, records)


def _distinct(models: Sequence[Evaluated]) -> list[str]:
    names = [model.name for model in models]
    return names if len(set(names)) == len(names) else [model.path for model in models]


def _override(option: tuple[str, str]) -> str:
    key, value = option
    if key == "sets":
        return f"sets=[{','.join(quoted(each) for each in value.split(',') if each)}]"
    return f"{key}={value}" if key in ("scale", "protocol", "count", "sampling.n") else f"{key}={quoted(value)}"


def _run_defaults(model: Evaluated, protocol: bool) -> list[str]:
    """A run is evaluated as it validated itself, unless something else is said.

    Args:
        protocol: whether one was named, which then says how to sample.
    """
    config = model.config
    if not config:
        return []
    data, rollout = config["data"], config["actor_rollout_ref"]["rollout"]
    found = [f"sets=[{','.join(map(quoted, files_of(config, 'val_files')))}]"]
    if options := data.get("apply_chat_template_kwargs"):
        found.append(f"template={_flow(options)}")
    if (Path(__file__).parents[2] / "config" / "pipelines" / "scale" / f"{config['opd']['scale']}.yaml").is_file():
        found.append(f"scale={config['opd']['scale']}")
    if not protocol:
        asked = rollout["val_kwargs"]
        tokens = config["opd"]["rollout"]["val_tokens"] or data["max_response_length"]
        found += [f"sampling.{name}={asked[name]}" for name in ("temperature", "top_p", "top_k", "n")]
        found.append(f"sampling.max_tokens={tokens}")
    return found


def _flow(options: Mapping[str, Any]) -> str:
    """A mapping in Hydra's grammar."""
    return "{" + ",".join(f"{name}:{json.dumps(value)}" for name, value in options.items()) + "}"
