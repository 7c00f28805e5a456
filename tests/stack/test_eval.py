# SPDX-License-Identifier: Apache-2.0
"""`opd eval` on real vLLM: two models, and the checkpoint of a run."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from opd_ext.launch import PATH_VARIABLE
from tests.stack.conftest import environment, finish


def evaluate(world: Path, out: Path, *words: str) -> str:
    command = [os.environ[PATH_VARIABLE], "-m", "opd_ext.cli", "eval", *words, f"--out={out}"]
    return finish(command, environment(world), out.parent)


@pytest.fixture
def asked(world) -> list[str]:
    files = f"--on={world}/tinymath/val.parquet"
    return [files, "--scale=cpu_tiny", "--n=2", "--count=24", "sampling.max_tokens=96"]


def test_two_models_are_told_apart_and_nothing_is_sampled_twice(world, asked, tmp_path):
    """The large model of the world is right about nine times in ten, the base hardly once (its card)."""
    out = tmp_path / "eval"
    words = [f"{world}/tinymath/large", f"--against={world}/tinymath/base", *asked]
    said = evaluate(world, out, *words)
    assert "large against base" in said and "better" in said
    report = json.loads((out / "report" / "report.json").read_text())
    large, base = report["accuracy"]
    assert (large["model"], base["model"], large["problems"], large["n"]) == ("large", "base", 24, 2)
    (record,) = report["comparison"]
    assert record["change"] > 0 and record["p_holm"] < 0.05
    samples = pd.read_parquet(out / "samples" / "model-val.parquet")
    assert len(samples) == 48 and len(set(samples["key"])) > 24  # two samples are two draws

    before = (out / "samples" / "model-val.parquet").stat().st_mtime_ns
    again = evaluate(world, out, *words)
    assert again.count("done before") == 4 and (out / "samples" / "model-val.parquet").stat().st_mtime_ns == before
    with pytest.raises(AssertionError, match="was run with n=2, not 4: make it again with --force"):
        evaluate(world, out, *[word.replace("--n=2", "--n=4") for word in words])


@pytest.mark.slow  # a run, its export and an evaluation
def test_a_run_is_exported_and_evaluated_as_it_validated(train, world, tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "trainer.total_training_steps=1")
    out = tmp_path / "eval"
    evaluate(world, out, str(run_dir), "--count=8", "--n=1", "sampling.max_tokens=64")
    assert (run_dir / "export" / "step_1" / "config.json").is_file()
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["models"] == {"run, step 1": str(run_dir / "export" / "step_1")}
    assert report["accuracy"][0]["set"] == "val" and report["accuracy"][0]["problems"] == 8
    again = evaluate(world, out, str(run_dir), "--count=8", "--n=1", "sampling.max_tokens=64")
    assert again.count("done before") == 2  # an exported checkpoint is the model that it was
