# SPDX-License-Identifier: Apache-2.0
"""``opd eval``: sample, grade, report; each model and set is a stage, so an interrupted evaluation goes on.

prompts-MODEL-SET -> evaluate-MODEL-SET -> report
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoConfig

from opd_ext.errors import ConfigError
from opd_ext.pipelines import problems
from opd_ext.pipelines.eval.config import EvalConfig
from opd_ext.pipelines.eval.models import Evaluated, evaluated
from opd_ext.pipelines.eval.votes import voted
from opd_ext.pipelines.graded import check_rows
from opd_ext.pipelines.settings import PromptsConfig
from opd_ext.pipelines.stages import Pipeline, Stage
from opd_ext.pipelines.steps import REFUSALS, SamplingSteps, write_frame
from opd_ext.plan.work import Sampling, sampling
from opd_ext.sampling.jobs import Job
from opd_ext.tokens.tables import PROMPTS, SAMPLES, read_table


class Evaluation(SamplingSteps):
    """One model on all sets."""

    config: EvalConfig

    def __init__(self, config: EvalConfig, key: str, model: Evaluated):
        super().__init__(replace(config, model=model.readable))
        self.key, self.model = key, model

    def stages(self) -> list[Stage]:
        rendering = [self.render(f"{self.key}-{name}", self.prompts_of(f)) for name, f in self.config.files.items()]
        return rendering + [self._stage(name, file) for name, file in self.config.files.items()]

    def grades(self, name: str) -> pd.DataFrame:
        """Of one set: uid, sample, acc and other verdicts, tokens, truncated, vote, data_source, difficulty."""
        return pd.read_parquet(self.folder / self._out(name))

    def sample(self, jobs: Sequence[Job], title: str) -> None:
        """As ever, on an engine that holds the longest prompt and its answer, whatever the machine's scale expects."""
        longest = max(int(read_table(Path(job.prompts), PROMPTS)["prompt_ids"].map(len).max()) for job in jobs)
        needed, asked = longest + self.config.sampling.max_tokens, self.config.vllm
        known = AutoConfig.from_pretrained(self.model.readable, trust_remote_code=self.config.trust_remote_code)
        limit = getattr(known.get_text_config(), "max_position_embeddings", None) or needed
        if needed > limit:
            raise ConfigError(
                f"{self.model.name} reads at most {limit} tokens, and the longest prompt of {longest} with "
                f"sampling.max_tokens={self.config.sampling.max_tokens} is more: lower the latter."
            )
        length = min(max(asked.max_model_len, needed), limit)
        self.config = replace(self.config, vllm=replace(asked, max_model_len=length))
        super().sample(jobs, title)

    def prompts_of(self, file: Path) -> PromptsConfig:
        """What is asked of a set."""
        config = self.config
        return PromptsConfig(
            file=str(file), count=config.count, deduplicate=False, system=config.system, template=config.template
        )

    def _out(self, name: str) -> str:
        return f"grades/{self.key}-{name}.parquet"

    def _job(self, name: str) -> Job:
        asked, n = self.config.sampling, self.config.samples_of(name)
        split, out = f"{self.key}-{name}", f"samples/{self.key}-{name}.parquet"
        job = self.job(self.model.path, None, split, out, asked, n, asked.max_tokens)
        return replace(job, weights=self.model.identity)

    def _stage(self, name: str, file: Path) -> Stage:
        asked, n = self.config.sampling, self.config.samples_of(name)
        graders = {source: self.config.grader_of(source).described() for source in sources(file, self.config.count)}
        settings = self.sampling_settings(self.model.path, asked, n, asked.max_tokens)
        settings |= {"model": self.model.identity, "graders": graders}
        return Stage(
            f"evaluate-{self.key}-{name}",
            lambda: self._evaluate(name, file),
            settings,
            [self._out(name)],
            [f"prompts-{self.key}-{name}"],
            owns=[f"samples/{self.key}-{name}.parquet"],
            work=[self._planned(file, n)],
        )

    def _planned(self, file: Path, n: int) -> Sampling:
        config, model = self.config, self.model.readable
        mean = config.plan.mean_val_response
        return sampling(model, str(file), config.count, n, config.sampling.max_tokens, config.template, mean)

    def _evaluate(self, name: str, file: Path) -> dict[str, Any]:
        """Grade the samples of a set; the first stage that has none samples for all sets, on one start of vLLM."""
        job = self._job(name)
        if not job.done:
            self.model.have()
            self.sample([self._job(each) for each in self.config.files], f"samples of {self.key}")
        rows = problems.read_problems(self.prompts_of(file))
        samples = read_table(Path(job.out), SAMPLES)
        texts = pd.Series(problems.decode(samples, self.tokenizer), samples.index)
        of_problem = rows.set_index("uid")["data_source"].map(str).loc[samples["uid"]].set_axis(samples.index)
        parts = []
        for source in of_problem.unique():
            mine, grader = of_problem == source, self.config.grader_of(source)
            graded = problems.grade(samples[mine], rows, self.tokenizer, grader)
            parts.append(graded.assign(vote=voted(grader, texts[mine]), data_source=source))
        table = pd.concat(parts).sort_index()
        extra = rows["extra_info"] if "extra_info" in rows else pd.Series([None] * len(rows))
        levels = [None if level is None else str(level) for level in ((info or {}).get("difficulty") for info in extra)]
        difficulty = table["uid"].map(dict(zip(rows["uid"], levels, strict=True)))
        write_frame(self.folder / self._out(name), table.assign(difficulty=difficulty))
        return {"samples": len(table)}


def sources(file: Path, count: int | None) -> list[str]:
    """The data sources of the first ``count`` rows of a file, of all of them for None.

    Raises:
        ConfigError: the file lacks a column that grading needs.
    """
    problems.check_columns(str(file), graded=True)
    found = pd.read_parquet(file, columns=["data_source"])["data_source"].iloc[:count]
    if found.isna().any():
        raise ConfigError(f"{file} has a row without data_source, which says how it is graded.")
    return sorted(found.map(str).unique())


def build(config: EvalConfig) -> tuple[Pipeline, dict[str, Evaluation]]:
    """The stages of an evaluation, and by key, ``model`` and ``against``, what each model needs.

    Raises:
        ConfigError: a model that is none, a set that cannot be graded.
    """
    models = {"model": evaluated("model", config.model, config.step)}
    if config.against:
        models["against"] = evaluated("against", config.against, config.against_step)
    evaluations = {key: Evaluation(config, key, model) for key, model in models.items()}
    stages = [stage for each in evaluations.values() for stage in each.stages()]
    for file in config.files.values():
        rows = problems.read_problems(evaluations["model"].prompts_of(file))
        check_rows(str(file), rows, config.grader_of)
    return Pipeline(Path(config.run_dir), stages, REFUSALS), evaluations
