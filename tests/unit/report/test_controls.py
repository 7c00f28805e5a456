# SPDX-License-Identifier: Apache-2.0
"""A verdict on a method and its controls: right where the truth is known, silent where the runs say nothing."""

import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from opd_ext.report.compare import Arm
from opd_ext.report.controls import judge, load_study, verdicts, write_study
from tests.unit.report.test_compare import write_run

PROBLEMS = 200


def arm(name, rate, length=60.0, seeds=3, stem="x", problems=PROBLEMS):
    """An arm that solves a share of the problems; the same are hard for every arm."""
    draw = np.random.default_rng([ord(letter) for letter in name + stem])
    hard = np.random.default_rng(1).random(problems)
    right = (hard[None] + draw.normal(0, 0.1, (seeds, problems)) < rate).astype(float)
    lengths = length + draw.normal(0, 5, (seeds, problems))
    return Arm(name, list(range(seeds)), {4: right}, {4: lengths}, {})


def verdict(**arms):
    found = {name: arm(name, *values) for name, values in arms.items()}
    table, comparisons = judge(found)
    return table, comparisons, verdicts(comparisons, "srpo")


def test_a_gain_survives_the_control_that_lacks_it_and_not_the_one_that_has_it():
    _, comparisons, said = verdict(base=(0.4,), method=(0.7,), constant_weight=(0.45,), random_places=(0.7,))
    accuracy = said[0]
    assert accuracy.startswith("accuracy: srpo gains +") and "the gain survives: constant weight" in accuracy
    assert "not shown against: random places" in accuracy
    assert said[1].startswith("tokens: no gain over the base is shown")
    rows = comparisons.set_index(["outcome", "against"])["shown"]
    assert rows["accuracy"].to_dict() == {"base": 1, "constant_weight": 1, "random_places": 0}


def test_fewer_tokens_are_a_gain_and_a_control_may_gain_more():
    _, _, said = verdict(base=(0.5, 80), method=(0.5, 60), prefix_only=(0.5, 40), instruction_alone=(0.5, 75))
    assert said[0].startswith("accuracy: no gain over the base is shown")
    assert (
        "the gain survives: instruction alone" in said[1] and "the control gains more than srpo: prefix only" in said[1]
    )


def test_a_method_that_harms_is_said_to_and_its_controls_have_nothing_to_explain():
    _, _, said = verdict(base=(0.7,), method=(0.4,), constant_weight=(0.4,))
    assert "worse than the base" in said[0] and "survives" not in said[0]


def test_holm_counts_all_arms_and_both_outcomes():
    _, comparisons, _ = verdict(base=(0.4,), method=(0.45,), constant_weight=(0.4,), random_places=(0.42,))
    assert len(comparisons) == 6
    ordered = comparisons.sort_values("p")
    assert (ordered["p_holm"].to_numpy() >= ordered["p"].to_numpy()).all()
    assert ordered["p_holm"].iloc[0] == pytest.approx(min(1, 6 * ordered["p"].iloc[0]))


def test_seeds_that_disagree_keep_a_gain_from_being_shown():
    """By problem the means differ surely; from seed to seed the method is now better, now worse."""
    rates, problems = (0.2, 0.9, 0.85), 400
    hard = np.random.default_rng(1).random(problems)
    right = np.stack([(hard < rate).astype(float) for rate in rates])
    shaky = Arm("method", [1, 2, 3], {4: right}, {4: np.ones_like(right)}, {})
    calm = np.stack([(hard < 0.5).astype(float)] * 3)
    base = Arm("base", [1, 2, 3], {4: calm}, {4: np.ones_like(calm)}, {})
    _, comparisons = judge({"base": base, "method": shaky})
    row = comparisons.set_index("outcome").loc["accuracy"]
    assert row["p_holm"] < 0.05 and row["difference_low"] < 0 and row["shown"] == 0


def test_equal_arms_are_rarely_called_different():
    """Under the null the whole family is wrong in at most one study of twenty (here: 60, of one seed each)."""
    wrong = 0
    for i in range(60):
        found = {
            name: arm(name, 0.5, 60.0, 1, f"{i}", 60) for name in ("base", "method", "constant_weight", "prefix_only")
        }
        wrong += bool((judge(found)[1]["shown"] != 0).any())
    assert wrong <= 7  # binomial, p 0.02


@pytest.fixture
def study(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, "method", seed, (0.4, 0.7, 0.9))
        write_run(tmp_path, "random_places", seed, (0.4, 0.5, 0.5))
        alone = write_run(tmp_path, "instruction_alone", seed, (0.5,), steps=(0,), length=30)
        (alone / "metrics.jsonl").write_text(json.dumps({"step": 0, "phase": "val", "val/accuracy": 0.5}) + "\n")
    (tmp_path / "study.json").write_text(
        json.dumps(
            {
                "method": "trace",
                "arms": ["method", "random_places", "instruction_alone"],
                "seeds": [1, 2],
                "skipped": {"constant_weight": "why not"},
            }
        )
    )
    return tmp_path


def test_a_study_is_read_with_its_base_and_an_arm_that_trains_nothing(study):
    arms = load_study(study)
    assert list(arms) == ["base", "method", "random_places", "instruction_alone"]
    assert (arms["base"].last, arms["method"].last, arms["instruction_alone"].last) == (0, 20, 0)


def test_a_run_that_ended_early_counts_with_its_last_validation(study):
    ended = study / "random_places-seed2"
    (ended / "generations" / "val_20.jsonl").unlink()
    arms = load_study(study)
    assert arms["random_places"].accuracy[20].mean(axis=1).tolist() == pytest.approx([0.5, 0.5])


def test_a_study_is_written_whole(study):
    console = Console(width=160, record=True)
    said = write_study(study, console)
    text, content = (study / "controls.md").read_text(), json.loads((study / "controls.json").read_text())
    assert content["verdicts"] == said and all(sentence in text for sentence in said)
    assert content["not_applicable"] == {"constant_weight": "why not"}
    assert "random places" in console.export_text() and (study / "controls.png").stat().st_size > 1000
    assert {row["against"] for row in content["against"]} == {"base", "random_places", "instruction_alone"}
    generated = {row["arm"]: row["generated"] for row in content["arms"]}
    whole = 20 * 64 * 50 / 1000  # steps, rollouts and their mean tokens
    assert generated == {"base": 0, "method": whole, "random_places": whole, "instruction_alone": 0}


def test_other_problems_are_refused(study):
    run = study / "random_places-seed1" / "generations" / "val_20.jsonl"
    run.write_text("".join(run.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ValueError, match="random_places-seed1 was validated on other problems"):
        load_study(study)


def test_an_arm_without_runs_is_refused(study):
    content = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(content | {"arms": ["method", "prefix_only"]}))
    with pytest.raises(FileNotFoundError, match="prefix_only-seed1"):
        load_study(study)


def test_accuracy_of_ungraded_data_is_left_out():
    found = {name: arm(name, 0.5) for name in ("base", "method", "prefix_only")}
    for each in found.values():
        each.accuracy[4][:] = np.nan
    _, comparisons = judge(found)
    assert set(comparisons["outcome"]) == {"tokens"} and isinstance(comparisons, pd.DataFrame)
