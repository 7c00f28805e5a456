# SPDX-License-Identifier: Apache-2.0
"""What the stages of both pipelines are made of: rendering, sampling, fine-tuning and evaluation in a run's folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from opd_ext.errors import ConfigError
from opd_ext.files import write_whole
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import PipelineConfig, PromptsConfig, SampledConfig, TrainConfig, plain
from opd_ext.pipelines.stages import Manifest, Stage
from opd_ext.plan.work import Reading, Sampling, Training, Work, sampling
from opd_ext.sampling.config import Decoding
from opd_ext.sampling.jobs import Engines, Job, sample
from opd_ext.tokens.ends import stop_ids
from opd_ext.tokens.finetuning import FineTuning, fine_tune
from opd_ext.tokens.tables import PROMPTS, SAMPLES, TRAINING, TableError, read_table, write_table

# What moves work between machines and processes, or makes it fit, but decides no result.
_PLACEMENT = (
    "replicas",
    "tensor_parallel_size",
    "ranks",
    "nodes",
    "tokens_per_gpu",
    "max_model_len",
    "gpu_memory_utilization",
)
REFUSALS = (ConfigError, TableError)
"""How a stage says, before it has made anything, that its input will not do."""

SAMPLER, FINE_TUNER = "opd_ext.bridge.sampler", "opd_ext.bridge.finetune"
"""Modules that run in processes of their own."""

SCORES = ["split", "temperature", "uid", "sample", "acc", "tokens", "truncated"]


class SamplingSteps:
    """A folder, its settings, and what samples of one model are made of.

    Args:
        seen: inputs are here and are read. Otherwise stages have their names and their order, and cannot run.
    """

    config: SampledConfig

    def __init__(self, config: SampledConfig, seen: bool = True):
        self.config, self.folder, self.seen = config, Path(config.run_dir), seen
        self.manifest = Manifest(self.folder)
        if seen:
            self.tokenizer = problems.load_tokenizer(config.model, config.trust_remote_code)
        self.stop_ids = stop_ids(config.model, self.tokenizer) if seen else []

    # ------------------------------------------------------------------ prompts

    def render(self, name: str, settings: PromptsConfig, after: Sequence[str] = ()) -> Stage:
        """``prompts/<name>.parquet`` from a file in verl's format."""

        def run() -> dict[str, Any]:
            rows = problems.read_problems(settings)
            rendered = problems.render_prompts(rows, self.tokenizer, settings)
            write_table(self.prompts(name), rendered, PROMPTS)
            lengths = rendered["prompt_ids"].map(len)
            return {"prompts": len(rows), "longest": int(lengths.max())}

        # A file may move; what it holds must not change.
        file = hashlib.sha256(Path(settings.file).read_bytes()).hexdigest() if self.seen else None
        content = {**plain(settings), "file": file}
        if not settings.wording:
            del content["wording"]  # stages of runs that are older than the key still count
        model = {"model": problems.fingerprint(self.config.model), "stop_ids": self.stop_ids}
        return Stage(f"prompts-{name}", run, {**content, **model}, [f"prompts/{name}.parquet"], list(after))

    def prompts(self, name: str) -> Path:
        return self.folder / "prompts" / f"{name}.parquet"

    # ------------------------------------------------------------------ sampling

    def job(
        self, model: str, made_by: str | None, prompts: str, out: str, decoding: Decoding, n: int, max_tokens: int
    ) -> Job:
        """Samples of ``model``, which the stage ``made_by`` made, or which was there before."""
        made = made_by and f"{self.manifest.outputs_digest(made_by)}/{Path(model).relative_to(self.folder)}"
        return Job(
            model=model,
            weights=made or problems.fingerprint(model),
            engine=json.dumps(self.engine_settings, sort_keys=True),
            prompts=str(self.prompts(prompts)),
            out=str(self.folder / out),
            temperature=decoding.temperature,
            top_k=decoding.top_k,
            top_p=decoding.top_p,
            n=n,
            max_tokens=max_tokens,
            seed=self.config.seed,
            stop_ids=tuple(self.stop_ids),
            shard=self.config.vllm.shard,
        )

    def sample(self, jobs: Sequence[Job], title: str) -> None:
        """Run the jobs that are not done, on one start of the engines."""
        config = self.config
        for prompts in {job.prompts for job in jobs}:
            longest = max(job.max_tokens for job in jobs if job.prompts == prompts)
            table = read_table(Path(prompts), PROMPTS)
            problems.check_lengths(table, longest, config.vllm.max_model_len, "max_tokens")
        engines = Engines.vllm(SAMPLER, config.vllm, config.trust_remote_code)
        sample(jobs, engines, config.device, self.environment, self.folder / "logs", title)

    @property
    def environment(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.config.environment.items()}

    @property
    def engine_settings(self) -> dict[str, Any]:
        """Of vLLM, as far as they decide numbers."""
        vllm = self.config.vllm
        settings = {"dtype": vllm.dtype, **plain(vllm.args)}
        return {key: value for key, value in settings.items() if key not in _PLACEMENT}

    def sampling_settings(self, model: str, decoding: Decoding, n: int, max_tokens: int) -> dict[str, Any]:
        """Of a stage that samples; ``model`` where no stage made it."""
        own = {name: getattr(decoding, name) for name in ("temperature", "top_k", "top_p")}
        engine = self.engine_settings | {"shard": self.config.vllm.shard}
        model = problems.fingerprint(model)
        return {**own, "model": model, "n": n, "max_tokens": max_tokens, "seed": self.config.seed, "vllm": engine}


class Steps(SamplingSteps):
    """The stages that any pipeline with a fine-tuning may have."""

    config: PipelineConfig

    # ------------------------------------------------------------------ what a plan sees

    def planned(self, model: str, n: int, limit: int, loads: int = 1) -> Sampling:
        """``n`` responses of a model to each prompt that is trained on."""
        p = self.config.prompts
        return sampling(model, p.file, p.count, n, limit, p.template, self.config.plan.mean_response, loads)

    @property
    def trained_tokens(self) -> float:
        """Mean tokens of a response that is trained on, as far as anybody can say beforehand."""
        limit = self.config.train.max_length
        return min(self.planned(str(self.config.model), 1, limit).mean, limit)

    def reading(self, sequences: int, mean: float, passes: int, **further: int) -> Reading:
        """Passes of the model that is trained, or of its checkpoints."""
        return Reading(str(self.config.model), sequences, mean, passes, **further)

    # ------------------------------------------------------------------ fine-tuning

    def fine_tuning(self, name: str, samples: str, train: TrainConfig | None = None, **further: Any) -> FineTuning:
        """A fine-tuning of the model in ``train/<name>``; paths relative to the run's folder."""
        if flags := further.pop("flags", None):
            further["flags"] = str(self.folder / flags)
        return FineTuning(
            **{
                "model": self.config.model,
                "samples": str(self.folder / samples),
                "out": str(self.folder / "train" / name),
                "train": asdict(train or self.config.train),
                "stop_ids": self.stop_ids,
                "seed": self.config.seed,
                "device": self.config.device,
                "trust_remote_code": self.config.trust_remote_code,
                **further,
            }
        )

    def train(self, name: str, task: FineTuning, after: Sequence[str], keep: Sequence[int] = ()) -> Stage:
        """Fine-tune; ``keep`` names the steps whose models count as outputs besides the last."""
        task = replace(task, keep=sorted({*keep, task.train["steps"]}))

        def run() -> dict[str, Any]:
            table = read_table(Path(task.samples), TRAINING)
            size, limit = task.train["batch_size"], task.train["max_length"]
            if len(table) < size:
                raise TableError(
                    f"{task.samples} has {len(table)} rows, less than train.batch_size={size}; lower that."
                )
            fine_tune(task, FINE_TUNER, self.environment, f"fine-tuning {name}")
            lengths = table["prompt_ids"].map(len) + table["response_ids"].map(len)
            return {"rows": len(table), "cut": int((lengths > limit).sum())}

        content = {key: value for key, value in plain(task).items() if key not in ("out", "samples", "flags")}
        content["train"] = {key: value for key, value in content["train"].items() if key not in _PLACEMENT}
        content["model"] = problems.fingerprint(task.model)
        outputs = [str(task.checkpoint(step).relative_to(self.folder)) for step in task.keep]
        work: list[Work] = [Training(task.model, task.train, self.trained_tokens, len(task.keep))]
        return Stage(f"train-{name}", run, content, outputs, list(after), [f"train/{name}"], work)

    # ------------------------------------------------------------------ evaluation

    @property
    def splits(self) -> dict[str, PromptsConfig]:
        """Where temperatures are chosen, and what is reported."""
        e = self.config.evaluate
        prompts = self.config.prompts
        wording = prompts.wording if e.wording is None else e.wording
        shared = {"count": e.count, "system": prompts.system, "template": prompts.template, "wording": wording}
        files = {"report": e.file} | ({"select": e.select_file} if e.select_file else {})
        return {name: PromptsConfig(file=file, deduplicate=False, **shared) for name, file in files.items()}

    def evaluation_stages(self, models: dict[str, tuple[str, str | None]]) -> list[Stage]:
        """One stage per model, after one that renders each split.

        Args:
            models: name -> (path, stage that made it).
        """
        stages = [self.render(split, settings) for split, settings in self.splits.items()]
        names = [stage.name for stage in stages]
        for name, (_, made_by) in models.items():
            after = [*names, *([made_by] if made_by else [])]
            e = self.config.evaluate
            settings = {
                **self.sampling_settings(self.config.model, Decoding(0.0, e.top_k, e.top_p), e.n, e.max_tokens),
                "temperatures": e.temperatures,
                "reward": self.config.reward.described(),
            }
            outputs = [f"evaluate/{name}.parquet"]
            owns = [f"evaluate/samples/{name}-{split}-*" for split in self.splits]
            stages.append(
                Stage(
                    f"evaluate-{name}",
                    lambda name=name: self._evaluate(name, models),
                    settings,
                    outputs,
                    after,
                    owns,
                    self._planned_evaluation(),
                )
            )
        return stages

    def _planned_evaluation(self) -> list[Work]:
        e, mean = self.config.evaluate, self.config.plan.mean_val_response
        n = e.n * len(e.temperatures)
        model, files = str(self.config.model), self.splits.values()
        return [sampling(model, s.file, s.count, n, e.max_tokens, s.template, mean) for s in files]

    def _evaluation_jobs(self, name: str, model: str, made_by: str | None) -> dict[tuple[str, float], Job]:
        e = self.config.evaluate
        return {
            (split, t): self.job(
                model,
                made_by,
                split,
                f"evaluate/samples/{name}-{split}-T{t:g}.parquet",
                Decoding(t, e.top_k, e.top_p),
                e.n,
                e.max_tokens,
            )
            for split in self.splits
            for t in e.temperatures
        }

    def _evaluate(self, name: str, models: dict[str, tuple[str, str | None]]) -> dict[str, Any]:
        """Grade the samples of one model; the first that has none samples for all, on one start of the engines."""
        jobs = {other: self._evaluation_jobs(other, *of) for other, of in models.items()}
        if not all(job.done for job in jobs[name].values()):
            self.sample([job for of in jobs.values() for job in of.values()], "evaluation")
        grades = []
        for (split, temperature), job in jobs[name].items():
            rows = problems.read_problems(self.splits[split])
            graded = problems.grade(read_table(Path(job.out), SAMPLES), rows, self.tokenizer, self.config.reward)
            grades.append(graded.assign(split=split, temperature=temperature))
        write_frame(self.folder / "evaluate" / f"{name}.parquet", pd.concat(grades, ignore_index=True)[SCORES])
        return {}

    def scores(self, name: str) -> pd.DataFrame:
        """Grades of one model, with the columns ``SCORES``."""
        return pd.read_parquet(self.folder / "evaluate" / f"{name}.parquet")

    @property
    def difficulties(self) -> pd.Series:
        """`extra_info.difficulty` of the reported problems, by uid; missing where a data set has none."""
        rows = problems.read_problems(self.splits["report"])
        extra = rows["extra_info"] if "extra_info" in rows else [None] * len(rows)
        return pd.Series([(info or {}).get("difficulty") for info in extra], index=rows["uid"])


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a parquet file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, frame.to_parquet(index=False))
