# SPDX-License-Identifier: Apache-2.0
"""The stages that only T3S has: traces, the trajectory of the pilot, the selection, the merged model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from opd_ext import launch
from opd_ext.files import write_whole
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import plain
from opd_ext.pipelines.stages import Stage, StageError
from opd_ext.pipelines.steps import write_frame
from opd_ext.pipelines.t3s import selection
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.pipelines.t3s.merge import recovering_residual_transfer
from opd_ext.pipelines.t3s.report import trajectory_lines
from opd_ext.pipelines.traces import TRACES, TracedSteps
from opd_ext.plan.run import dtype_bytes
from opd_ext.plan.work import Work
from opd_ext.progress import Progress
from opd_ext.sampling.config import Decoding
from opd_ext.sampling.jobs import Job
from opd_ext.tokens.finetuning import FineTuning
from opd_ext.tokens.tables import CONFIDENCE, FLAGS, PROMPTS, SAMPLES, aligned, read_table, write_table

SELECTION, CURVE, CHOICE = "selection.json", "trajectory.parquet", "bottleneck.json"
RRT = "rrt"


class T3S(TracedSteps):
    """A run of T3S."""

    config: T3SConfig

    @property
    def pilot(self) -> FineTuning:
        return self.fine_tuning("pilot", TRACES)

    # ------------------------------------------------------------------ trajectory

    @property
    def checkpoints(self) -> dict[int, str]:
        """Step -> model, the base first."""
        return {0: self.config.model} | {step: str(self.pilot.checkpoint(step)) for step in self.pilot.saved_steps}

    def _scoring_jobs(self) -> dict[int, Job]:
        b, limit = self.config.bottleneck, self.config.evaluate.max_tokens
        decoding = Decoding(b.temperature, b.top_k, b.top_p)
        return {
            step: self.job(
                model,
                "train-pilot" if step else None,
                "traced",
                f"samples/step-{step:06d}.parquet",
                decoding,
                b.n,
                limit,
            )
            for step, model in self.checkpoints.items()
        }

    def score_stage(self) -> Stage:
        """Accuracy of every checkpoint on the prompts that it was trained on, by generation and grader."""

        def run() -> dict[str, Any]:
            trained = set(read_table(self.folder / TRACES, SAMPLES)["uid"])
            prompts = read_table(self.prompts("train"), PROMPTS)
            write_table(self.prompts("traced"), prompts[prompts["uid"].isin(trained)], PROMPTS)
            jobs = self._scoring_jobs()
            self.sample(list(jobs.values()), "scoring checkpoints")
            rows, curve = problems.read_problems(self.config.prompts), []
            for step, job in jobs.items():
                graded = problems.grade(read_table(Path(job.out), SAMPLES), rows, self.tokenizer, self.config.reward)
                curve.append({"step": step, **_point(graded)})
            write_frame(self.folder / CURVE, pd.DataFrame(curve))
            return {}

        b = self.config.bottleneck
        settings = self.sampling_settings(self.config.model, b, b.n, self.config.evaluate.max_tokens) | {
            "reward": self.config.reward.described()
        }
        samples = [f"samples/step-{step:06d}.parquet" for step in self.checkpoints]
        looks, limit = len(self.checkpoints), self.config.evaluate.max_tokens
        work: list[Work] = [self.planned(str(self.config.model), b.n * looks, limit, loads=looks)]
        return Stage("score", run, settings, [CURVE, *samples], ["traces", "train-pilot"], work=work)

    def bottleneck_stage(self) -> Stage:
        """The step whose checkpoint splits the tokens; without a real dip there is none, and that is said."""

        def run() -> dict[str, Any]:
            curve, b = pd.read_parquet(self.folder / CURVE), self.config.bottleneck
            # Of a difference of two means on the same prompts; treating them as independent asks for more.
            noise = b.standard_errors * math.hypot(curve["standard_error"].iloc[0], curve["standard_error"].max())
            found = selection.pick_bottleneck(curve["step"].tolist(), curve["accuracy"].tolist(), noise)
            if b.step is not None:
                if b.step not in set(curve["step"]) - {0}:
                    raise StageError(f"bottleneck.step={b.step} is no saved step: {curve['step'].tolist()[1:]}.")
                drop = curve["accuracy"].iloc[0] - curve.set_index("step")["accuracy"][b.step]
                found = selection.Bottleneck(
                    b.step, float(drop), bool(drop > noise), b.step == self.pilot.train["steps"]
                )
            elif not found.has_dip or found.at_end:
                raise StageError(_no_bottleneck(curve, found, noise))
            write_whole(self.folder / CHOICE, json.dumps(plain(found) | {"noise": noise}, indent=2).encode())
            return plain(found)

        settings = {"standard_errors": self.config.bottleneck.standard_errors, "step": self.config.bottleneck.step}
        return Stage("bottleneck", run, settings, [CHOICE], ["score"])

    @property
    def bottleneck(self) -> int:
        return json.loads((self.folder / CHOICE).read_text())["step"]

    def confidence_file(self, step: int) -> Path:
        return self.folder / "confidence" / f"step-{step:06d}.parquet"

    def confidence_stage(self) -> Stage:
        """Log-prob of every response token under every checkpoint, by the training engine's own kernels."""

        def run() -> dict[str, Any]:
            task = dataclasses.asdict(self.pilot)
            for name in ("model", "out"):
                task.pop(name)
            models = {str(self.confidence_file(step)): model for step, model in self.checkpoints.items()}
            spec = self.folder / "logs" / "confidence.json"
            write_whole(spec, json.dumps(task | {"models": models}).encode())
            train, log = self.config.train, spec.with_suffix(".log")
            command = launch.Command(
                "opd_ext.bridge.confidence", [str(spec)], log, train.ranks, train.ranks, self.environment, train.nodes
            )
            with Progress("confidence", len(models), "checkpoints") as progress:
                launch.run(
                    [command],
                    self.config.device,
                    lambda: progress.update(sum(Path(file).exists() for file in models)),
                )
            return {}

        outputs = [str(self.confidence_file(step).relative_to(self.folder)) for step in self.checkpoints]
        train = self.config.train
        traces = self.planned(str(self.config.model), 1, train.max_length).requests
        engine = train.verl.get("engine") or {}
        width = dtype_bytes((engine.get("mixed_precision") or {}).get("param_dtype", "bf16"))
        budget = max(train.tokens_per_gpu, train.max_length)
        sizes = {"ranks": train.ranks, "width": width, "resident": 1, "logits": budget}
        reads = self.reading(traces, self.trained_tokens, len(self.checkpoints), **sizes)
        settings = {"verl": plain(train.verl)}
        return Stage("confidence", run, settings, outputs, ["traces", "train-pilot"], work=[reads])

    def confidences(self, step: int) -> list[np.ndarray]:
        """Per trace, float32 log-probs of its response tokens under the checkpoint of a step, [R_i]."""
        path = self.confidence_file(step)
        return aligned(read_table(self.folder / TRACES, SAMPLES), read_table(path, CONFIDENCE), "logp", path)

    # ------------------------------------------------------------------ selection

    def selection_stage(self) -> Stage:
        """The mask of every arm."""
        config = self.config

        def run() -> dict[str, Any]:
            base, low = self.confidences(0), self.confidences(self.bottleneck)
            keep = per_response(selection.keep_mask, base, low, config.threshold)
            if config.always_keep_eos:
                for row in keep:
                    row[-1] = True
            masks = {
                "t3s": keep,
                "inverse": [~row for row in keep],
                "random": selection.random_keep(keep, config.seed),
                "lowest": selection.lowest_confidence_keep(keep, base),
            }
            wanted = {arm: masks[arm] for arm in config.arms}
            self.write_masks(wanted)
            statistics = selection.selection_statistics(keep, base, low)
            below = {
                step: selection.fraction_below_base(base, self.confidences(step)) for step in self.checkpoints if step
            }
            statistics["eos_anchor_fraction"] = float(np.mean([not row[-1] for row in keep]))
            statistics["fraction_below_base_by_step"] = below
            write_whole(self.folder / SELECTION, json.dumps(statistics, indent=2).encode())
            return {}

        settings = {
            "threshold": config.threshold,
            "always_keep_eos": config.always_keep_eos,
            "arms": config.arms,
            "seed": config.seed,
        }
        outputs = [SELECTION, *(f"masks/{arm}.parquet" for arm in config.arms)]
        return Stage("select", run, settings, outputs, ["traces", "bottleneck", "confidence"])

    def write_masks(self, masks: dict[str, list[np.ndarray]]) -> None:
        """``masks/<name>.parquet`` for the traces, in their order."""
        keys = read_table(self.folder / TRACES, SAMPLES)["key"]
        for name, flags in masks.items():
            rows = pd.DataFrame({"key": keys, "flags": flags})
            write_table(self.folder / "masks" / f"{name}.parquet", rows, FLAGS, bottleneck=str(self.bottleneck))

    def restore_stage(self, tau: float) -> Stage:
        """What a diffusion model must always restore, and as many positions at random."""

        def run() -> dict[str, Any]:
            base, low = self.confidences(0), self.confidences(self.bottleneck)
            restore = per_response(selection.restore_mask, base, low, tau)
            self.write_masks({"restore": restore, "restore-random": selection.random_keep(restore, self.config.seed)})
            return {"fraction": float(np.concatenate(restore).mean())}

        outputs = [f"masks/{name}.parquet" for name in ("restore", "restore-random")]
        settings = {"tau": tau, "seed": self.config.seed}
        return Stage("select-diffusion", run, settings, outputs, ["traces", "bottleneck", "confidence"])

    def rrt_stage(self) -> Stage:
        """The merged model, which costs three reads and no training."""

        def run() -> dict[str, Any]:
            bottleneck = self.pilot.checkpoint(self.bottleneck)
            recovering_residual_transfer(self.config.model, bottleneck, self.pilot.final, self.folder / RRT)
            return {}

        return Stage("rrt", run, {}, [RRT], ["train-pilot", "bottleneck"])


def per_response(rule: Any, base: list[np.ndarray], low: list[np.ndarray], threshold: float) -> list[np.ndarray]:
    """A rule of :mod:`.selection` on the responses, all of whose tokens count; [R_i] bool each."""
    pairs = zip(map(torch.tensor, base), map(torch.tensor, low), strict=True)
    return [rule(b, x, torch.ones(len(b)), threshold).numpy() for b, x in pairs]


def _point(graded: pd.DataFrame) -> dict[str, float]:
    """One checkpoint: accuracy with its standard error over prompts, cut-off responses and length."""
    of_prompt = graded.groupby("uid")["acc"].mean()
    return {
        "accuracy": float(of_prompt.mean()),
        "standard_error": float(of_prompt.std(ddof=1) / math.sqrt(len(of_prompt))),
        "truncated": float(graded["truncated"].mean()),
        "tokens": float(graded["tokens"].mean()),
    }


def _no_bottleneck(curve: pd.DataFrame, found: selection.Bottleneck, noise: float) -> str:
    if found.has_dip:
        reason = f"the lowest point is the last checkpoint, step {found.step}: train longer, to see whether it recovers"
    else:
        reason = (
            f"the lowest point, step {found.step}, is {100 * found.dip:.1f} points below the base, and noise accounts "
            f"for {100 * noise:.1f}: there is nothing to select on (raise train.lr or bottleneck.n, or name "
            "bottleneck.step)"
        )
    return f"No bottleneck, {reason}.\n" + "\n".join(trajectory_lines(curve))
