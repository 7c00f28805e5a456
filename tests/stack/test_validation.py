# SPDX-License-Identifier: Apache-2.0
"""Sets with their own numbers of samples and a monitor, on the real stack: who is asked, with which draws, and what of
it comes to the console, the metrics, the report and a resumed run."""

import json
import shutil

import pandas as pd
import pytest
from typer.testing import CliRunner

from opd_ext.checkpoints import best
from opd_ext.cli import app
from opd_ext.report.metrics import undescribed
from opd_ext.report.run_report import before_after
from tests.stack.conftest import metrics

EASY, HARD = 12, 20  # problems
MONITOR = 5  # of each
# Nothing is learnt, so equal requests have equal answers; but a batch of another size may round otherwise, and about
# one in 10^6 draws then falls on the other side of a threshold: one sample of some hundred may differ.
FROZEN = 1


def rows(run_dir, name, step):
    lines = (run_dir / "generations" / f"{name}_{step}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def answers(found):
    return {(row["data_source"], row["index"], row["sample"]): row["output"] for row in found}


def phases(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["phase"], line["step"]) for line in lines if line["phase"] != "train"]


@pytest.fixture(scope="module")
def settings(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    table = pd.read_parquet(world / "tinymath" / "val.parquet")
    for name, part in {"easy": table[:EASY], "hard": table[EASY : EASY + HARD]}.items():
        part.assign(data_source=name).to_parquet(folder / f"{name}.parquet")
    return [
        f"data.val_files=[{folder}/easy.parquet,{folder}/hard.parquet]",
        "data.val_max_samples=-1",
        "data.val_batch_size=10",  # several batches
        "opd.validation.sets={easy: {n: 3, every: 2}}",
        f"opd.validation.monitor={{problems: {MONITOR}, n: 2}}",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        "actor_rollout_ref.actor.optim.lr=0.0",
        "trainer.val_before_train=true",
        "trainer.test_freq=1",
        "trainer.total_training_steps=4",
    ]


@pytest.fixture(scope="module")
def run(train, settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("validation") / "run"
    return run_dir, train(run_dir, *settings)


def test_everything_is_validated_before_and_after_and_the_monitor_meanwhile(run):
    run_dir, output = run
    assert phases(run_dir) == [
        *[("monitor", 0), ("val", 0), ("monitor", 1), ("monitor", 2), ("sets", 2), ("monitor", 3)],
        *[("monitor", 4), ("val", 4)],
    ]
    full = metrics(run_dir, "val")
    assert [(line["val/samples"], line["val/easy/samples"], line["val/hard/samples"]) for line in full] == [
        (3 * EASY + 2 * HARD, 3 * EASY, 2 * HARD)
    ] * 2
    assert {line["monitor/samples"] for line in metrics(run_dir, "monitor")} == {2 * 2 * MONITOR}
    (part,) = metrics(run_dir, "sets")
    assert part["val/easy/samples"] == 3 * EASY and "val/accuracy" not in part and "val/hard/samples" not in part
    for line in (*full, part, *metrics(run_dir, "monitor")):
        assert not undescribed(line)
    assert not [name for line in metrics(run_dir) for name in line if name.startswith(("val/", "monitor/"))]
    assert "val 4" in output and "mon 1" in output and "set easy at step 2: " in output


def test_problems_weigh_the_same_however_often_they_are_sampled(run):
    line, found = metrics(run[0], "val")[0], rows(run[0], "val", 0)
    by_problem = pd.DataFrame(found).groupby(["data_source", "index"])["acc"].mean()
    assert len(by_problem) == EASY + HARD
    assert line["val/accuracy"] == pytest.approx(by_problem.mean(), abs=1e-12)
    assert line["val/easy/accuracy"] == pytest.approx(by_problem["easy"].mean(), abs=1e-12)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_the_monitor_draws_the_first_samples_of_the_full_protocol(run, step):
    few, all_of_them = answers(rows(run[0], "monitor", step)), answers(rows(run[0], "val", 0))
    assert len(few) == 2 * 2 * MONITOR and few.keys() <= all_of_them.keys()
    assert sum(text != all_of_them[name] for name, text in few.items()) <= FROZEN
    assert len(set(few.values())) > len(few) / 2, "samples of a problem are draws of their own"


def test_the_report_compares_the_full_protocol_and_the_best_step_is_the_monitors(run):
    run_dir, output = run
    table = before_after(run_dir)
    assert table.attrs == {"first_step": 0, "last_step": 4}
    assert list(table["group"][:3]) == ["all", "easy", "hard"] and table["problems"][0] == EASY + HARD
    assert "step 0 to 4" in output
    monitor = {line["step"]: line["monitor/accuracy"] for line in metrics(run_dir, "monitor")}
    assert best.validations(run_dir) == monitor and list(monitor) == [0, 1, 2, 3, 4]
    assert "4/4" in CliRunner().invoke(app, ["ls", str(run_dir)]).output


@pytest.mark.slow
def test_a_resumed_run_validates_what_an_undisturbed_one_does(run, settings, train, tmp_path):
    undisturbed, again = run[0], tmp_path / "again"
    shutil.copytree(undisturbed, again)
    for step in (3, 4):
        shutil.rmtree(again / "checkpoints" / f"global_step_{step}")
    (again / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    for path in (again / "generations").glob("*_[34].jsonl"):
        path.unlink()
    train(again, *settings)
    resumed_at = [("monitor", 2), ("sets", 2)]
    assert phases(again) == [*phases(undisturbed)[:5], *resumed_at, *phases(undisturbed)[5:]]
    for name, step in [("monitor", 2), ("sets", 2), ("monitor", 3), ("monitor", 4), ("val", 4)]:
        ours, theirs = (answers(rows(folder, name, step)) for folder in (again, undisturbed))
        assert ours.keys() == theirs.keys()
        assert sum(ours[place] != theirs[place] for place in ours) <= FROZEN
