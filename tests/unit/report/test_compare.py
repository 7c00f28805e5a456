# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: paired by problem, wide enough for seeds, and honest about runs that do not match."""

import json

import numpy as np
import pytest
from rich.console import Console

from opd_ext.report.compare import compare, load_arms, markdown, write_comparison

PROBLEMS = 60
STEPS = (0, 10, 20)


def write_run(folder, method, seed, accuracy, steps=STEPS, problems=PROBLEMS, length=50):
    """A run folder whose validations are right on the first ``accuracy`` share of the problems."""
    run = folder / f"{method}-seed{seed}"
    (run / "generations").mkdir(parents=True)
    (run / "config.yaml").write_text(f"opd:\n  method: {method}\n  seed: {seed}\n")
    lines = [{"step": step, "phase": "train", "time": 0.0, "timing_s/step": 2.0, "rollout/samples": 64,
              "rollout/tokens_mean": 50.0, "opd/student_entropy": 0.3} for step in range(1, steps[-1] + 1)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, share in zip(steps, accuracy, strict=True):
        rows = [
            {"data_source": "d", "index": i, "acc": float(i < share * problems), "response_tokens": length}
            for i in range(problems)
        ]
        (run / "generations" / f"val_{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def folder(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "slow", seed, (0.5, 0.6, 0.7))
        write_run(tmp_path, "fast", seed, (0.5, 0.7, 0.8), length=40)
    return tmp_path


def test_means_costs_and_the_steps_to_a_target(folder):
    arms = {arm.name: arm for arm in load_arms(folder)}
    table, differences = compare(list(arms.values()), [("fast", "slow")])
    rows = table.set_index("method")
    assert rows.loc["fast", "accuracy"] == pytest.approx(80.0)
    assert rows.loc["slow", "seed_min"] == rows.loc["slow", "seed_max"] == pytest.approx(70.0)
    assert rows.loc["fast", "generated"] == pytest.approx(20 * 64 * 50 / 1000)
    assert rows.loc["fast", "seconds"] == 40 and rows.loc["fast", "annotator_calls"] == 0
    row = differences.iloc[0]
    assert row["accuracy"] == pytest.approx(10.0, abs=0.5) and row["tokens"] == pytest.approx(-10)
    assert (row["target"], row["steps"], row["baseline_steps"]) == pytest.approx((70.0, 10.0, 20.0))


def test_differences_are_paired_by_problem(folder):
    """Both methods solve the same problems first, so their difference is far surer than either accuracy."""
    table, differences = compare(load_arms(folder), [("fast", "slow")])
    alone = table.iloc[0]["accuracy_high"] - table.iloc[0]["accuracy_low"]
    paired = differences.iloc[0]["accuracy_high"] - differences.iloc[0]["accuracy_low"]
    assert paired < 0.8 * alone
    assert differences.iloc[0]["accuracy_low"] > 0


def test_a_control_is_no_seed_of_its_method(folder):
    config = folder / "fast-seed3" / "config.yaml"
    config.write_text(config.read_text() + "  control: prefix_only\n")
    arms = {arm.name: arm.seeds for arm in load_arms(folder)}
    assert arms == {"slow": [1, 2, 3], "fast": [1, 2], "fast, prefix_only": [3]}


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    for seed, last in ((1, 0.2), (2, 0.5), (3, 0.8)):
        write_run(tmp_path, "shaky", seed, (0.5, 0.5, last))
        write_run(tmp_path, "calm", seed, (0.5, 0.5, 0.5))
    table, _ = compare(load_arms(tmp_path))
    width = (table["accuracy_high"] - table["accuracy_low"]).to_numpy()
    by_name = dict(zip(table["method"], width, strict=True))
    assert by_name["shaky"] > 1.3 * by_name["calm"]


def test_the_same_folder_gives_the_same_numbers(folder):
    first, second = (markdown(*compare(load_arms(folder), [("fast", "slow")])) for _ in range(2))
    assert first == second and "fast - slow" in first


def test_files_are_written_and_the_tables_printed(folder):
    console = Console(width=160, record=True)
    write_comparison(folder, [("fast", "slow")], console)
    assert {"comparison.md", "comparison.json", "comparison.png"} <= {path.name for path in folder.iterdir()}
    record = json.loads((folder / "comparison.json").read_text())
    assert record["methods"][0]["divergence"] is None, "a method without a teacher has no divergence"
    text = console.export_text()
    assert "80.0" in text and "never" not in text


def test_a_target_that_is_never_reached_is_said_so(folder):
    _, differences = compare(load_arms(folder), [("slow", "fast")])
    assert np.isinf(differences.iloc[0]["steps"])
    assert "never (baseline: 20)" in markdown(*compare(load_arms(folder), [("slow", "fast")]))


def test_runs_that_cannot_be_compared_are_named(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="no run of other"):
        compare(load_arms(folder), [("other", "slow")])
    write_run(folder, "slow", 4, (0.5, 0.6), steps=(0, 10))
    with pytest.raises(ValueError, match=r"slow-seed4 validated at steps \[0, 10\]"):
        load_arms(folder)
    other = tmp_path_factory.mktemp("other")
    write_run(other, "a", 1, (0.5, 0.5, 0.5))
    write_run(other, "b", 1, (0.5, 0.5, 0.5), problems=30)
    with pytest.raises(ValueError, match="other problems"):
        load_arms(other)
    with pytest.raises(FileNotFoundError, match="no run folders"):
        load_arms(tmp_path_factory.mktemp("empty"))
