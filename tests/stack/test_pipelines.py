# SPDX-License-Identifier: Apache-2.0
"""SSD and T3S from prompts to weights with real vLLM and verl, killed on the way and started again."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from opd_ext import launch
from opd_ext.launch import PATH_VARIABLE
from opd_ext.pipelines.settings import compose_pipeline
from opd_ext.pipelines.stages import MANIFEST
from opd_ext.pipelines.steps import SAMPLER
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.sampling.jobs import Engines, Job, sample
from opd_ext.tokens.finetuning import FineTuning, read_metrics
from opd_ext.tokens.tables import CONFIDENCE, PROMPTS, SAMPLES, TRAINING, file_digest, read_table, write_table
from tests.stack.conftest import environment

DEADLINE_S = 600
POLL_S = 0.02
SMALL = [
    "prompts.count=48",
    "vllm.shard=8",
    "train.batch_size=8",
    "train.save_every=1",
    "train.lr=1e-3",
    "train.min_lr=0",
    "train.warmup_steps=0",
    "evaluate.count=24",
    "evaluate.n=1",
    "evaluate.max_tokens=64",
]
SSD = [
    "ssd",
    *SMALL,
    "max_tokens=64",
    "drop_shortest=0.1",
    "~arms.mild",
    "sweep=[]",
    "train.steps=8",
    "evaluate.temperatures=[1.0]",
    "diagnose=8",
]
# The model of these tests hardly knows arithmetic: whether its accuracy dips is chance, so the step is named.
T3S = ["t3s", *SMALL, "teacher=${world}/base", "traces={n: 8, temperature: 1.0, max_tokens: 64}", "train.steps=4"]
T3S += ["bottleneck={n: 2, step: 2}", "arms=[t3s]", "evaluate.select_file=null"]


def start(world: Path, run_dir: Path, *arguments: str) -> subprocess.Popen:
    """`opd` in a session of its own, its output beside the run's folder."""
    command = [os.environ[PATH_VARIABLE], "-m", "opd_ext.cli", *arguments, f"run_dir={run_dir}"]
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, env=environment(world), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(world: Path, run_dir: Path, *arguments: str) -> None:
    """Run to the end."""
    status = start(world, run_dir, *arguments).wait(DEADLINE_S)
    assert status == 0, run_dir.with_suffix(".log").read_text()[-4000:]


def kill_when(process: subprocess.Popen, there: Callable[[], bool]) -> None:
    """Kill -9 as soon as something is there; what the process started must go with it."""
    until = time.monotonic() + DEADLINE_S
    while not there():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(POLL_S)
    process.send_signal(signal.SIGKILL)
    process.wait()


def results(run_dir: Path, *patterns: str) -> dict[str, str]:
    """Digest of every file that matches."""
    files = sorted(file for pattern in patterns for file in run_dir.glob(pattern))
    assert files
    return {str(file.relative_to(run_dir)): file_digest(file) for file in files}


@pytest.fixture(scope="module")
def ssd_run(world, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("ssd") / "run"
    finish(world, run_dir, *SSD)
    return run_dir


@pytest.fixture(scope="module")
def t3s_run(world, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("t3s") / "run"
    finish(world, run_dir, *T3S, "--until", "rrt")
    return run_dir


def test_ssd_killed_in_every_stage_ends_with_the_same_files(world, ssd_run, tmp_path):
    run_dir = tmp_path / "run"
    stages = [
        lambda: any(run_dir.glob("samples/.*.parts/00001.parquet")),
        lambda: (run_dir / "train/control/checkpoints/global_step_3").exists(),
        lambda: (run_dir / "train/ssd/checkpoints/global_step_6").exists(),  # after an epoch: 48 rows or less, by 8
        lambda: any(run_dir.glob("evaluate/samples/.*.parts/00000.parquet")),
    ]
    for there in stages:
        kill_when(start(world, run_dir, *SSD), there)
    parts = list(run_dir.glob("evaluate/samples/.*.parts/*.parquet"))
    assert parts  # what was sampled before the kill is there, and used
    finish(world, run_dir, *SSD)
    kept = "samples/*.parquet", "training/*", "train/*/checkpoints/*/huggingface/*.safetensors", "evaluate/*.parquet"
    assert results(run_dir, *kept) == results(ssd_run, *kept)
    assert not list(run_dir.rglob(".*.parts")) and not list(run_dir.rglob(".incomplete*"))


def test_ssd_says_what_it_did(ssd_run):
    manifest = json.loads((ssd_run / MANIFEST).read_text())
    notes = manifest["sample-ssd"]["notes"]
    assert notes["samples"] == 48 and 0 < notes["short"] <= 4
    assert len(read_table(ssd_run / "training/ssd.parquet", TRAINING)) == 48 - notes["stubs"] - notes["short"]
    report = (ssd_run / "report" / "report.md").read_text()
    assert "| ssd | 1.6 / 20 / 0.8 |" in report and "| control | 1 / - / 1 |" in report
    assert (ssd_run / "report" / "report.html").stat().st_size > 10_000
    steps = [entry["step"] for entry in read_metrics(ssd_run / "train" / "ssd")]
    assert steps == list(range(1, 9))


def test_a_finished_pipeline_has_nothing_to_do_and_refuses_other_settings(world, ssd_run):
    made = [file for kind in ("parquet", "safetensors", "jsonl") for file in ssd_run.rglob(f"*.{kind}")]
    before = results(ssd_run, "samples/*.parquet", "train/**/*.safetensors")
    written = [file.stat().st_mtime_ns for file in made]  # by vLLM and by the trainer
    finish(world, ssd_run, *SSD)
    assert written == [file.stat().st_mtime_ns for file in made]
    process = start(world, ssd_run, *SSD, "train.lr=1e-4")
    assert process.wait(DEADLINE_S) == 2
    assert "train.lr=0.001, not 0.0001" in ssd_run.with_suffix(".log").read_text()
    assert results(ssd_run, "samples/*.parquet", "train/**/*.safetensors") == before


@pytest.fixture
def ray_cluster(monkeypatch):
    """Launched processes are Ray tasks in this test, as they are on a cluster."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "local")
    yield
    assert ray.is_initialized()  # else nothing was launched through it
    ray.shutdown()


def test_the_decoding_reaches_vllm(world, tmp_path, ray_cluster):
    """top-k 1 leaves one choice at any temperature, and the same request gives the same sample beside any others."""
    config = compose_pipeline("t3s", T3SConfig, [f"world={world}/tinymath", *T3S[1:]])
    rows = read_table_of_prompts(world)
    write_table(tmp_path / "prompts.parquet", rows, PROMPTS)

    def job(name: str, shard: int, **settings) -> Job:
        common = dict(
            model=config.model, weights="", engine="", prompts=str(tmp_path / "prompts.parquet"), max_tokens=32, seed=3
        )
        decoding = dict(temperature=1.0, top_k=-1, top_p=1.0, n=3, stop_ids=(eos(world),))
        return Job(out=str(tmp_path / f"{name}.parquet"), shard=shard, **{**common, **decoding, **settings})

    jobs = [job("greedy", 16, temperature=2.0, top_k=1), job("free", 16), job("other", 7)]
    sample(jobs, Engines.vllm(SAMPLER, config.vllm), "cpu", config.environment, tmp_path / "logs", "test")
    greedy, free, other = (read_table(Path(each.out), SAMPLES) for each in jobs)
    assert greedy.groupby("uid")["key"].nunique().max() == 1
    assert free.groupby("uid")["key"].nunique().mean() > 1.5
    # Not the same batches, so a near tie may fall the other way; on this machine's kernels none of 48 does.
    assert (free["key"] == other["key"]).mean() > 0.9
    ends = free["response_ids"].map(lambda ids: ids[-1] == eos(world))
    assert (ends == (free["finish_reason"] == "stop")).all()


def read_table_of_prompts(world: Path) -> pd.DataFrame:
    rows = pd.read_parquet(world / "tinymath" / "val.parquet").head(16)
    ids = [
        tokenizer(world).apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for messages in rows["prompt"]
    ]
    return pd.DataFrame({"uid": [str(index) for index in range(len(rows))], "prompt_ids": ids})


def tokenizer(world: Path):
    from opd_ext.pipelines.problems import load_tokenizer

    return load_tokenizer(str(world / "tinymath" / "base"))


def eos(world: Path) -> int:
    return tokenizer(world).eos_token_id


@pytest.mark.slow
def test_t3s_killed_in_every_stage_ends_with_the_same_files(world, t3s_run, tmp_path):
    run_dir = tmp_path / "run"
    stages = [  # bottleneck and select take milliseconds
        lambda: any(run_dir.glob("samples/.teacher.*.parts/00002.parquet")),
        lambda: (run_dir / "train/pilot/checkpoints/global_step_2").exists(),
        lambda: any(run_dir.glob("samples/.step-*.parts/00000.parquet")),
        lambda: (run_dir / "confidence/step-000001.parquet").exists(),
        lambda: (run_dir / "train/t3s/checkpoints/global_step_3").exists(),
        lambda: (run_dir / "rrt").exists() or (run_dir / ".rrt.tmp").exists(),
    ]
    for there in stages:
        kill_when(start(world, run_dir, *T3S, "--until", "rrt"), there)
    finish(world, run_dir, *T3S, "--until", "rrt")
    kept = "traces.parquet", "samples/*.parquet", "confidence/*.parquet", "masks/*", "selection.json"
    kept += ("train/*/checkpoints/*/huggingface/*.safetensors", "rrt/*.safetensors")
    assert results(run_dir, *kept) == results(t3s_run, *kept)


def test_the_second_run_starts_from_the_base_and_trains_what_was_kept(world, t3s_run):
    """Its first loss is the base's mean over the kept tokens of the first batch: nothing of the pilot is in it."""
    rows = read_table(t3s_run / "traces.parquet", SAMPLES)
    logp = read_table(t3s_run / "confidence/step-000000.parquet", CONFIDENCE).set_index("key")["logp"]
    masks = pd.read_parquet(t3s_run / "masks/t3s.parquet").set_index("key")["flags"]
    task = FineTuning.read(t3s_run / "train/t3s/finetuning.json")
    assert task.flags and task.model == FineTuning.read(t3s_run / "train/pilot/finetuning.json").model
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(task.seed * 1_000_003)).tolist()
    keys = rows["key"].iloc[order[: task.train["batch_size"]]]
    for arm, kept in (("pilot", lambda key: np.ones(len(logp[key]), bool)), ("t3s", lambda key: masks[key])):
        tokens = np.concatenate([logp[key][kept(key)] for key in keys])
        first = read_metrics(t3s_run / "train" / arm)[0]["train/loss"]
        assert first == pytest.approx(-tokens.mean(), abs=1e-5)  # float32 sums in another order


@pytest.fixture(scope="module")
def two_ranks(world, t3s_run, tmp_path_factory) -> Path:
    """The pilot's first step and its confidence in the traces again, on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    content = json.loads((t3s_run / "train/pilot/finetuning.json").read_text())
    content["train"] |= {"steps": 1, "ranks": 2}
    content["out"] = str(folder / "train")
    config = compose_pipeline("t3s", T3SConfig, [f"world={world}/tinymath", *T3S[1:]])
    settings = {name: str(value) for name, value in config.environment.items()} | {"OMP_NUM_THREADS": "1"}
    (folder / "train").mkdir()
    specs = {"opd_ext.bridge.finetune": content}
    without = {key: value for key, value in content.items() if key not in ("model", "out")}
    specs["opd_ext.bridge.confidence"] = without | {"models": {str(folder / "confidence.parquet"): content["model"]}}
    for module, spec in specs.items():
        (folder / f"{module}.json").write_text(json.dumps(spec))
        arguments = [str(folder / f"{module}.json")]
        launch.run([launch.Command(module, arguments, folder / f"{module}.log", 2, 2, settings)], "cpu")
    return folder


def test_two_ranks_see_what_one_sees(t3s_run, two_ranks):
    one = read_metrics(t3s_run / "train" / "pilot")[0]
    two = read_metrics(two_ranks / "train")[0]
    for name in ("train/loss", "train/grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)  # float32 sums in another order
    a = read_table(t3s_run / "confidence/step-000000.parquet", CONFIDENCE)
    b = read_table(two_ranks / "confidence.parquet", CONFIDENCE)
    assert a["key"].tolist() == b["key"].tolist()
    for x, y in zip(a["logp"], b["logp"], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)  # other packs, so other orders of summation


def test_confidence_is_what_transformers_computes(world, t3s_run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "tinymath" / "base", dtype=torch.float32).eval()
    rows = read_table(t3s_run / "traces.parquet", SAMPLES).head(4)
    found = read_table(t3s_run / "confidence/step-000000.parquet", CONFIDENCE).set_index("key")["logp"]
    for row in rows.itertuples():
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        with torch.no_grad():
            logp = model(ids).logits.log_softmax(-1)[0, len(row.prompt_ids) - 1 : -1]
        expected = logp.gather(-1, ids[0, len(row.prompt_ids) :, None]).squeeze(-1)
        np.testing.assert_allclose(found[row.key], expected.numpy(), atol=1e-5)  # packed against single, float32


def test_no_dip_stops_the_pipeline_and_says_so(world, t3s_run, tmp_path):
    arguments = [argument for argument in T3S if "bottleneck" not in argument]
    # Fifty standard errors of noise: no accuracy can fall by that much.
    run_dir = shutil.copytree(t3s_run, tmp_path / "run")
    process = start(world, run_dir, *arguments, "bottleneck={n: 2, standard_errors: 50}", "--force", "bottleneck")
    assert process.wait(DEADLINE_S) == 2
    log = run_dir.with_suffix(".log").read_text()
    assert "No bottleneck, the lowest point" in log and "accuracy on training prompts" in log
    assert (run_dir / "traces.parquet").exists() and "score: done before" in log  # the folder may move
