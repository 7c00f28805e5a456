# SPDX-License-Identifier: Apache-2.0
"""Searches for one question: what is refused, what is not repeated, what is reported. (A real one: tests/stack.)"""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from opd_ext.config import checks
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.pipelines.discover import SearchError, discover, plan_search

MODEL, GRADER = "actor_rollout_ref.model.path", "reward.custom_reward_function"


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.parquet"
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}+1?"}], "extra_info": {"index": i}} for i in range(3)]
    pd.DataFrame(rows).to_parquet(path)
    return path


def finish(out, seed, found, step=4):
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "discovery.json").write_text(json.dumps({"attempts": 16 * step, "found": found, "step": step}))


def test_finished_searches_are_reported_and_not_repeated(questions, tmp_path):
    """Nothing could be started here: the data set is not even one of a world."""
    out = tmp_path / "out"
    for seed, found in ((1, 3), (2, None), (3, 40)):
        finish(out, seed, found)
    console = Console(width=120, record=True)
    assert discover(questions, 1, out, seeds=3, budget=64, console=console) == [3, None, 40]
    record = json.loads((out / "discovery.json").read_text())
    assert record["first_success"] == [3, None, 40] and record["budget"] == 64
    assert record["discovery_at_k"]["2"] == 0.0
    assert record["discovery_at_k"]["4"] == pytest.approx(1 / 3)
    assert record["discovery_at_k"]["64"] == pytest.approx(2 / 3)
    assert (out / "discovery.png").stat().st_size > 1000
    assert "3, none, 40" in console.export_text()
    assert pd.read_parquet(out / "question.parquet").iloc[0]["extra_info"]["index"] == 1


def test_a_folder_holds_searches_for_one_question(questions, tmp_path):
    out = tmp_path / "out"
    finish(out, 1, 5)
    discover(questions, 0, out, seeds=1, budget=16, console=Console(quiet=True))
    with pytest.raises(SearchError, match="another question"):
        discover(questions, 1, out, seeds=1, budget=16)


def test_bad_input_is_named(questions, tmp_path):
    with pytest.raises(SearchError, match="rows 0 to 2; there is no row 3"):
        discover(questions, 3, tmp_path / "out")
    with pytest.raises(SearchError, match="at least 1"):
        discover(questions, 0, tmp_path / "out", seeds=0)


# SDPO, arXiv 2601.20802 (v2), table of hyper-parameters, column of section 5.
PUBLISHED = {
    "opd.method": "sdpo",
    "opd.teacher.rate": 0.01,
    "opd.context.include_feedback": True,
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "topk",
    "opd.divergence.k": 20,
    "opd.divergence.tail": "bucket",
    "opd.credit.importance_cap": 2.0,
    "opd.credit.rollout_cap": 2.0,
    "data.train_batch_size": 1,
    "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.model.path": "Qwen/Qwen3-8B",
    "reward.custom_reward_function.path": "pkg://opd_ext.rewards.code",
    "opd.stop_on_success": 1.0,
    "trainer.total_training_steps": 172,
}


def test_the_recipe_of_a_search_is_the_published_one(questions, tmp_path, monkeypatch):
    asked = []

    def search(folder, settings):
        asked.extend(settings)
        finish(tmp_path / "out", 1, 5)

    monkeypatch.setattr("opd_ext.pipelines.discover._search", search)
    overrides = ["recipe=sdpo/discover"]
    discover(questions, 0, tmp_path / "out", seeds=1, budget=2752, overrides=overrides, console=Console(quiet=True))
    config = compose_config(asked)
    checks.check(config)
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED} == PUBLISHED


def test_a_search_that_is_refused_is_one_sentence(questions, tmp_path):
    with pytest.raises(SearchError, match=r"^opd.teacher.weights=stale.*") as refused:
        discover(questions, 0, tmp_path / "out", seeds=1, overrides=["opd.teacher.weights=stale"])
    assert "\n" not in str(refused.value)


def test_a_search_that_fails_shows_the_end_of_its_log(questions, tmp_path, monkeypatch):
    monkeypatch.setattr("opd_ext.pipelines.discover.sys.executable", "/bin/false")
    with pytest.raises(SearchError, match=r"failed with status 1; the end of .*search.log"):
        discover(questions, 0, tmp_path / "out", seeds=1)


def test_a_dry_run_plans_one_search_and_leaves_nothing(questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = pd.read_parquet(questions).assign(data_source="sums", reward_model=[{"ground_truth": "1"}] * 3)
    rows.to_parquet(questions)
    before = sorted(tmp_path.rglob("*"))
    plan_search(
        questions,
        1,
        32,
        16,
        ["scale=node_8xh200", f"{MODEL}=/not/on/this/machine", f"{GRADER}.path=pkg://opd_ext.rewards.math_dual"],
    )
    printed = capsys.readouterr().out
    assert "Nothing was started" in printed and "discovery@k" not in printed
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="Did you mean sdpo"):
        plan_search(questions, 1, 8, 4, ["method=sdpoo"])


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text("<html>")
    with pytest.raises(SearchError, match="a.parquet cannot be read as parquet"):
        discover(path, 0, tmp_path / "out")
