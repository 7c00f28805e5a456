# SPDX-License-Identifier: Apache-2.0
"""Every method on the second level of the miniature world: same base, same number of rollouts, several seeds.

    python benchmarks/long_world.py                                   10 methods x 3 seeds, one after the other
    python benchmarks/long_world.py --methods grpo,sdpo --seeds 1,2   some of them
    python benchmarks/long_world.py --methods iw_opd+constant_weight  a method and a control, of `opd train control=`
    python benchmarks/long_world.py --methods base+instruction        not trained: base, large, base+instruction
    python benchmarks/long_world.py --report                          the tables again, of what is finished
    python benchmarks/long_world.py -- opd.selftest=false             any setting of `opd train`, for all trainers alike

Each run has a folder of its own in ``--out``. Every model answers the 1,000 test problems four times, at temperature 1;
of one that is not trained the seed is of these answers. What that gave, by problem, goes into ``--kept``, one file per
model. A model that has its file is not trained again, and a run that was interrupted goes on.
``comparison.{md,json,png}``, beside these files, hold accuracies and paired differences, with 95 % intervals over
problems and seeds.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from measure import RESULTS, provenance

from opd_ext.config.compose import compose_config
from opd_ext.config.schema import load
from opd_ext.context import build_context
from opd_ext.files import write_whole
from opd_ext.home import home
from opd_ext.report.compare import Arm, compare, finite
from opd_ext.tinymath import shipped
from opd_ext.tinymath.levels import LONG

SCALE = "cpu_tiny_long"
# Method -> problems per step; with the rollouts of each that makes 64.
TRAINED = {"grpo": 8, "cispo": 8, "opd": 64, "iw_opd": 64, "crisp": 64, "opsd": 64, "sdpo": 8, "trace": 8}
PIPELINES = ("ssd", "t3s")
BASE, TEACHER, INSTRUCTED = "base", "large", "base+instruction"
UNTRAINED = (BASE, TEACHER, INSTRUCTED)
CONTROLLED = (
    "iw_opd+constant_weight", "opd+constant_advantage", "opd+prefix_only", "opsd+another_problem",
    "sdpo+another_problem", "trace+random_places",
)  # fmt: skip
"""Method + control, where `opd compare METHOD --dry-run` says that it applies; CRISP's is `base+instruction`."""

OF_AN_EVALUATION = ("world", "problems", "samples")
PAIRS = (
    *((method, BASE) for method in (*TRAINED, *PIPELINES)),
    ("cispo", "grpo"), ("sdpo", "grpo"), ("trace", "grpo"), ("iw_opd", "opd"), ("opsd", "opd"), ("t3s", "opd"),
    ("opd", TEACHER), ("iw_opd", TEACHER), (INSTRUCTED, BASE), ("crisp", INSTRUCTED),
    *((name.partition("+")[0], name) for name in CONTROLLED),
)  # fmt: skip


def opd(log: Path, *arguments: str) -> float:
    """Run the command to its end, output into ``log``; seconds that it took. Raises CalledProcessError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("a") as file:
        subprocess.run([sys.executable, "-m", "opd_ext.cli", *arguments], stdout=file, stderr=file, check=True)
    return time.perf_counter() - began


def train(out: Path, method: str, seed: int, steps: int, overrides: Sequence[str]) -> Path:
    """Have the trained model of a method: its run folder, or a pipeline's model."""
    folder = out / f"{method}-seed{seed}"
    done = folder / "seconds.json"
    if method in PIPELINES:
        arguments = [method, f"scale={SCALE}", f"seed={seed}", f"run_dir='{folder}'"]
        # One arm, in place of the controls that the pipelines are published with.
        arguments += ["~arms.mild", "sweep=[]", "diagnose=0"] if method == "ssd" else ["arms=[t3s]", "rrt=false"]
    else:
        preset, _, control = method.partition("+")
        arguments = ["train", f"method={preset}", f"scale={SCALE}", f"opd.seed={seed}", f"opd.run_dir='{folder}'"]
        arguments += [f"control={control}"] if control else []
        arguments += [f"trainer.total_training_steps={steps}", f"data.train_batch_size={TRAINED[preset]}"]
        arguments += ["data.val_max_samples=64", "trainer.test_freq=10", "trainer.save_freq=10"]
        arguments += ["trainer.max_actor_ckpt_to_keep=1", *overrides]
    if not done.is_file():
        seconds = opd(out / f"{method}-seed{seed}.log", *arguments)
        write_whole(done, json.dumps({"seconds": seconds}).encode())
    if method not in PIPELINES:
        return folder
    found = sorted((folder / "train" / method / "checkpoints").glob("global_step_*/huggingface"), key=_step)
    return found[-1]


def _step(path: Path) -> int:
    return int(path.parent.name.rpartition("_")[2])


def instructed(out: Path, world: Path) -> Path:
    """The test problems as CRISP's teacher is asked them."""
    context = build_context(load(compose_config(["method=crisp", f"scale={SCALE}"]).opd).context)
    table = pd.read_parquet(world / "test.parquet")
    rows = table.to_dict("records")
    table["prompt"] = [context.messages({"raw_prompt": row["prompt"], "extra_info": row["extra_info"]}) for row in rows]
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    write_whole(out / "instructed.parquet", buffer.getvalue())
    return out / "instructed.parquet"


def evaluate(out: Path, kept: Path, name: str, model: Path, asked: dict, seed: int = 1, on: Path | None = None) -> None:
    """Have in ``kept`` what a model did: accuracy and tokens by test problem, means over its samples."""
    limit = [f"count={asked['problems']}"] if asked["problems"] else []
    opd(
        out / f"eval-{name}.log", "eval", str(model), "--on", str(on or home() / "tinymath_long" / "test.parquet"),
        "--n", str(asked["samples"]), "--scale", SCALE, f"run_dir='{out / 'eval' / name}'", "sampling.temperature=1.0",
        "sampling.top_p=1.0", "sampling.top_k=-1", "sampling.max_tokens=416", f"seed={seed}", *limit,
    )  # fmt: skip
    (grades,) = (out / "eval" / name / "grades").glob("*.parquet")
    table = pd.read_parquet(grades).groupby("uid")[["acc", "tokens"]].mean().sort_index()
    seconds = out / name / "seconds.json"
    took = json.loads(seconds.read_text()) if seconds.is_file() else {}
    table.attrs = asked | took | {"hardware": provenance("cpu", "")["hardware"]["name"]}
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    write_whole(kept / f"{name}.parquet", buffer.getvalue())


def read(kept: Path, name: str, asked: dict) -> pd.DataFrame | None:
    """What :func:`evaluate` kept, None where a model has not been evaluated.

    Raises SystemExit if it was made with other settings.
    """
    file = kept / f"{name}.parquet"
    if not file.is_file():
        return None
    table = pd.read_parquet(file)
    decisive = OF_AN_EVALUATION if name.startswith(tuple(f"{model}-" for model in UNTRAINED)) else tuple(asked)
    for key in decisive:
        if (made := table.attrs.get(key)) != asked[key]:
            raise SystemExit(f"{file} has {key} {made}, not {asked[key]}: name another folder by --kept.")
    return table


def arms(kept: Path, methods: Sequence[str], seeds: Sequence[int], asked: dict) -> list[Arm]:
    """What is finished, as the comparison of runs reads it."""
    found = []
    for method in methods:
        tables = {seed: read(kept, f"{method}-seed{seed}", asked) for seed in seeds}
        if finished := {seed: table for seed, table in tables.items() if table is not None}:
            found.append(_arm(method, finished))
    if not found:
        raise SystemExit(f"{kept} has no evaluation of any model: run the benchmark first.")
    return found


def _arm(name: str, tables: dict[int, pd.DataFrame]) -> Arm:
    accuracy, tokens = (np.stack([table[key].to_numpy() for table in tables.values()]) for key in ("acc", "tokens"))
    seconds = [table.attrs["seconds"] for table in tables.values() if "seconds" in table.attrs]
    # One validation, at the end: `step` has no other meaning here.
    return Arm(
        name, list(tables), {1: accuracy}, {1: tokens}, {"minutes": np.mean(seconds) / 60 if seconds else np.nan}
    )


def report(kept: Path, methods: Sequence[str], seeds: Sequence[int], asked: dict) -> str:
    """Write ``comparison.{md,json,png}`` and return the tables."""
    found = arms(kept, methods, seeds, asked)
    there = {arm.name for arm in found}
    table, differences = compare(found, [pair for pair in PAIRS if there.issuperset(pair)])
    problems = found[0].accuracy[1].shape[1]
    made = provenance("cpu", "", "verl")
    lines = [
        f"{problems} test problems; {asked['steps']} steps of 64 rollouts; {made['date']}, {made['hardware']['name']}.",
        "",
        "| method | seeds | accuracy % | seeds' range | tokens | minutes |",
        "|---|---|---|---|---|---|",
    ]
    table["took"] = ["-" if np.isnan(minutes) else f"{minutes:.0f}" for minutes in table["minutes"]]
    lines += [
        f"| {row['method']} | {row['seeds']} | {_interval(row, 'accuracy')} | {row['seed_min']:.1f} to "
        f"{row['seed_max']:.1f} | {_interval(row, 'tokens')} | {row['took']} |"
        for _, row in table.iterrows()
    ]
    lines += ["", "| method - baseline | accuracy, points | tokens |", "|---|---|---|"]
    lines += [
        f"| {row['method']} - {row['baseline']} | {_interval(row, 'accuracy', '+')} | {_interval(row, 'tokens', '+')} |"
        for _, row in differences.iterrows()
    ]
    text = "\n".join(lines) + "\n"
    records = {"made": made, "methods": table.to_dict("records"), "differences": differences.to_dict("records")}
    write_whole(kept / "comparison.md", text.encode())
    write_whole(kept / "comparison.json", (json.dumps(finite(records), indent=2) + "\n").encode())
    draw(table, differences).savefig(kept / "comparison.png", dpi=120)
    return text


def _interval(row: pd.Series, key: str, sign: str = "") -> str:
    value, low, high = (format(row[f"{key}{end}"], f"{sign}.1f") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def draw(table: pd.DataFrame, differences: pd.DataFrame) -> Figure:
    """Accuracies of all models, and the paired differences, each with its interval."""
    figure = Figure(figsize=(12, 0.8 + 0.35 * max(len(table), len(differences))), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = [f"{row['method']} - {row['baseline']}" for _, row in differences.iterrows()]
    for axes, frame, names in ((left, table, list(table["method"])), (right, differences, named)):
        for place, (_, row) in enumerate(frame.iterrows()):
            axes.plot([row["accuracy_low"], row["accuracy_high"]], [place, place], color="tab:blue")
            axes.plot(row["accuracy"], place, "o", color="tab:blue")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    left.set_xlabel("correct responses (%)")
    right.set_xlabel("difference, paired by problem (points)")
    right.axvline(0, color="black", linewidth=0.8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*UNTRAINED, *TRAINED, *PIPELINES, *CONTROLLED)
    parser.add_argument("--methods", default=",".join(every))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=40, help="of the trainers; pipelines have their own lengths")
    parser.add_argument("--problems", type=int, help="the first so many test problems; all 1,000 by default")
    parser.add_argument("--samples", type=int, default=4, help="per test problem")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OPD_RUNS", "runs")) / "long_world")
    parser.add_argument("--kept", type=Path, default=RESULTS / "long_world", help="results, a file per model")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables of what is there")
    parser.add_argument("overrides", nargs="*", help="settings of `opd train`, after --")
    given = parser.parse_args(arguments)
    out, kept, methods = given.out.absolute(), given.kept.absolute(), given.methods.split(",")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if unknown := [method for method in methods if method not in every]:
        parser.error(f"--methods {unknown[0]} is none of {', '.join(every)}")
    models = shipped.record(LONG)["models"]
    asked = {
        "world": [models[name]["digests"]["model.safetensors"] for name in ("base", "large")],
        "problems": given.problems,
        "samples": given.samples,
        "steps": given.steps,
        "settings": given.overrides,
    }
    if not given.report:
        world = home() / "tinymath_long"
        if not all(shipped.is_shipped(world / name, name, LONG) for name in ("base", "large")):
            parser.error("the world that is compared is not there: make it with `opd data tinymath long`")
        for seed in seeds:
            for method in methods:
                name = f"{method}-seed{seed}"
                if read(kept, name, asked) is None and method in UNTRAINED:
                    on = instructed(out, world) if method == INSTRUCTED else None
                    evaluate(out, kept, name, world / method.partition("+")[0], asked, seed, on)
                elif read(kept, name, asked) is None:
                    evaluate(out, kept, name, train(out, method, seed, given.steps, given.overrides), asked)
                print(f"{time.strftime('%H:%M:%S')}  {name} is finished", flush=True)
    print(report(kept, methods, seeds, asked))


if __name__ == "__main__":
    main()
