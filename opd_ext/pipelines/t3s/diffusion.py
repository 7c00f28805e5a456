# SPDX-License-Identifier: Apache-2.0
"""T3S for a masked-diffusion model: the autoregressive pilot selects, the diffusion model is trained.

    select-diffusion -> train-diffusion-ARM (plain, t3s, random) -> evaluate-diffusion-MODEL

Selection is turned around: tokens that the pilot lost confidence in are hidden, and so trained, in every epoch; the
anchors stay visible as often as chance has it (arXiv 2601.10348, dLLM objective). `random` always hides as many tokens,
chosen at random; `plain` hides none on purpose.
"""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig

from opd_ext.errors import ConfigError
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import TrainConfig, plain
from opd_ext.pipelines.stages import Stage
from opd_ext.pipelines.steps import SCORES, write_frame
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.pipelines.t3s.steps import T3S
from opd_ext.sampling.config import Decoding
from opd_ext.sampling.denoiser import Reading
from opd_ext.sampling.jobs import Engines, Job, sample
from opd_ext.tokens.dataset import Corruption
from opd_ext.tokens.finetuning import FineTuning
from opd_ext.tokens.tables import SAMPLES, read_table

MASKS = {"plain": None, "t3s": "restore", "random": "restore-random"}
BASE = "base"


def stages(steps: T3S, config: T3SConfig, traces: str) -> list[Stage]:
    """Fine-tunings and evaluations of the diffusion model, base included.

    Raises:
        ConfigError: its tokenizer numbers the student's tokens otherwise, or its config says too little.
    """
    reading = _reading(steps, config)
    tasks = {arm: _task(steps, config, reading, arm, traces) for arm in MASKS}
    found = [steps.restore_stage(config.diffusion.tau)]
    for arm, task in tasks.items():
        found.append(steps.train(f"diffusion-{arm}", task, ["traces", *(["select-diffusion"] if MASKS[arm] else [])]))
    models = {BASE: (config.diffusion.model, None)}
    models |= {arm: (str(task.final), f"train-diffusion-{arm}") for arm, task in tasks.items()}
    settings = {"threshold": config.diffusion.threshold, "reading": plain(reading), "reward": config.reward.described()}
    settings |= {"max_tokens": _max_tokens(config), "shard": config.vllm.shard}
    settings |= {"model": problems.fingerprint(config.diffusion.model)}
    for name, (_, made_by) in models.items():
        after = ["prompts-report", *([made_by] if made_by else [])]
        outputs = [f"evaluate/diffusion-{name}.parquet"]
        found.append(
            Stage(
                f"evaluate-diffusion-{name}",
                lambda name=name: _evaluate(steps, config, reading, name, models),
                settings,
                outputs,
                after,
                owns=[f"evaluate/samples/diffusion-{name}.parquet"],
            )
        )
    return found


def _reading(steps: T3S, config: T3SConfig) -> Reading:
    d = config.diffusion
    try:
        loaded = AutoConfig.from_pretrained(d.model, trust_remote_code=config.trust_remote_code)
        reading = Reading.of(loaded, d.mask_token_id, d.attention, d.block_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    theirs = problems.load_tokenizer(d.model, config.trust_remote_code).get_vocab()
    ours = steps.tokenizer.get_vocab()
    if wrong := [token for token, index in ours.items() if theirs.get(token) != index]:
        raise ConfigError(
            f"The tokenizers of {config.model} and {d.model} number '{wrong[0]}' differently ({len(wrong)} tokens in "
            "all): a selection is valid for the same token ids only."
        )
    return reading


def _task(steps: T3S, config: T3SConfig, reading: Reading, arm: str, traces: str) -> FineTuning:
    d = config.diffusion
    train: TrainConfig = copy.deepcopy(d.train)
    overrides = train.verl.setdefault("model", {}).setdefault("override_config", {})
    overrides |= {"attn_implementation": "sdpa", **reading.overrides}
    corruption = Corruption(
        low=d.ratio[0],
        high=d.ratio[1],
        seed=config.seed,
        end=steps.tokenizer.eos_token_id,
        block_size=reading.block_size if reading.attention == "block" else None,
        canvas=_max_tokens(config) if reading.attention == "full" else 0,
    )
    flags = f"masks/{MASKS[arm]}.parquet" if MASKS[arm] else None
    return steps.fine_tuning(f"diffusion-{arm}", traces, train, model=d.model, flags=flags, corruption=corruption)


def _evaluate(
    steps: T3S, config: T3SConfig, reading: Reading, name: str, models: dict[str, tuple[str, str | None]]
) -> dict[str, Any]:
    """Greedy answers to the reported problems, graded; the first model that has none answers for all."""
    jobs = {other: _job(steps, config, reading, other, *of) for other, of in models.items()}
    if not jobs[name].done:
        settings = {
            **plain(reading),
            "threshold": config.diffusion.threshold,
            "batch_size": config.diffusion.batch_size,
            "trust_remote_code": config.trust_remote_code,
        }
        replicas = config.vllm.replicas * config.vllm.tensor_parallel_size
        engines = Engines("opd_ext.sampling.denoiser", settings, replicas, 1)
        logs = steps.folder / "logs"
        sample(list(jobs.values()), engines, config.device, steps.environment, logs, "denoising")
    rows = problems.read_problems(steps.splits["report"])
    graded = problems.grade(read_table(Path(jobs[name].out), SAMPLES), rows, steps.tokenizer, config.reward)
    path = steps.folder / "evaluate" / f"diffusion-{name}.parquet"
    write_frame(path, graded.assign(split="report", temperature=0.0)[SCORES])
    return {}


def _job(steps: T3S, config: T3SConfig, reading: Reading, name: str, model: str, made_by: str | None) -> Job:
    out = f"evaluate/samples/diffusion-{name}.parquet"
    job = steps.job(model, made_by, "report", out, Decoding(0.0), 1, _max_tokens(config))
    return dataclasses.replace(job, engine=json.dumps({**plain(reading), "threshold": config.diffusion.threshold}))


def _max_tokens(config: T3SConfig) -> int:
    return config.diffusion.max_tokens or config.evaluate.max_tokens


def scores(steps: T3S) -> dict[str, pd.DataFrame]:
    """Grades of the base and of every arm."""
    return {name: steps.scores(f"diffusion-{name}") for name in (BASE, *MASKS)}
