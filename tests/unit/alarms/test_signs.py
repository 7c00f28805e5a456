# SPDX-License-Identifier: Apache-2.0
"""Every alarm is raised by the curve that it is for, once, and by no healthy one: constructed and of real runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opd_ext.alarms.config import ALARMS, AlarmsConfig
from opd_ext.alarms.signs import Validations, on, raised

CURVES = sorted((Path(__file__).parent / "curves").glob("*.jsonl"))
QUIET = Validations({}, 0)


def steps(count=60, seed=0, **changed):
    """A healthy run; ``changed``: metric -> f(step, value)."""
    draw = np.random.default_rng(seed)
    names = {"opd/student_entropy": "entropy", "rollout/tokens_mean": "length", "rollout/accuracy": "accuracy",
             "opd/divergence": "divergence", "teacher/samples": "taught", "opd/loss": "loss"}  # fmt: skip
    lines = []
    for step in range(1, count + 1):
        line = {
            "step": step,
            "opd/student_entropy": 0.4 * math.exp(0.1 * draw.standard_normal()),
            "rollout/tokens_mean": 300 * math.exp(0.1 * draw.standard_normal()),
            "rollout/accuracy": draw.binomial(64, 0.6) / 64,
            "rollout/samples": 64.0,
            "opd/divergence": 0.05 * math.exp(0.3 * draw.standard_normal()),
            "teacher/samples": 1.0,
            "teacher/age": float(step),
            "opd/loss": 0.05,
            "opd/grad_norm": 1.0,
            "opd/skipped": 0.0,
        }
        lines.append({key: changed.get(names.get(key), lambda _, value: value)(step, it) for key, it in line.items()})
    return lines


def alarms_of(lines, validations=QUIET, config=None):
    """Step -> the alarms that it raises."""
    config = config or AlarmsConfig()
    found = {}
    for i in range(1, len(lines) + 1):
        last = lines[i - 1]["step"]
        seen = Validations({at: it for at, it in validations.accuracy.items() if at <= last}, validations.problems)
        if names := raised(lines[:i], seen, config):
            found[last] = sorted(names)
    return found


def after(start, change):
    return lambda step, value: change(step - start, value) if step > start else value


BROKEN = {
    "entropy": [
        {"entropy": after(30, lambda _, value: value * 8)},
        {"entropy": after(30, lambda _, value: value / 8)},
        {"entropy": lambda step, value: value * math.exp(-0.1 * step)},  # too slow for any window, and gone
    ],
    "length": [{"length": after(30, lambda _, value: value * 4)}, {"length": after(30, lambda _, value: value / 8)}],
    "accuracy": [{"accuracy": after(30, lambda _, value: value / 10)}, {"accuracy": after(30, lambda *_: 0.0)}],
    "divergence": [
        {"divergence": after(30, lambda _, value: value * 20)},
        {"divergence": after(30, lambda n, value: math.nan)},
        {"loss": after(30, lambda n, value: math.inf)},
    ],
    "teacher": [{"taught": after(30, lambda *_: 0.0)}],
}


@pytest.mark.parametrize("alarm, curve", [(alarm, curve) for alarm, curves in BROKEN.items() for curve in curves])
@pytest.mark.parametrize("seed", range(3))
def test_a_curve_that_breaks_raises_its_alarm_once_and_no_other(alarm, curve, seed):
    found = alarms_of(steps(seed=seed, **curve))
    assert list(found.values()) == [[alarm]], found
    (step,) = found
    assert step <= 30 + (10 if alarm == "teacher" else 3) or "entropy" in curve


@pytest.mark.parametrize("seed", range(40))
def test_noise_raises_none(seed):
    assert alarms_of(steps(200, seed)) == {}


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_real_runs_raise_none(path):
    """CRISP and OPD shorten responses, SDPO on SmolLM2 does no good: none of them breaks."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    validations = {line["step"]: line["val/accuracy"] for line in lines if line["phase"] == "val"}
    assert len(train) > 30 and alarms_of(train, Validations(validations, 200)) == {}


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
@pytest.mark.parametrize("metric, factor", [("opd/student_entropy", 30), ("rollout/tokens_mean", 30)])
def test_a_real_run_that_breaks_is_seen(path, metric, factor):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    broken = [line | ({metric: line[metric] * factor} if line["step"] > 25 else {}) for line in train]
    name = {"opd/student_entropy": "entropy", "rollout/tokens_mean": "length"}[metric]
    assert [name] in alarms_of(broken).values()


def test_there_are_curves_of_real_runs():
    assert len(CURVES) >= 3


def test_a_refreshed_teacher_may_be_further_away():
    """CRISP's divergence jumps when a new teacher begins: that is no alarm, and without a refresh it is one."""
    jump = {"divergence": after(30, lambda _, value: value * 20)}
    lines = steps(**jump)
    assert alarms_of(lines) == {33: ["divergence"]}
    refreshed = [line | {"teacher/age": float(line["step"] - 31 * (line["step"] > 30))} for line in lines]
    assert alarms_of(refreshed) == {}


@pytest.mark.parametrize("gamed", [True, False])
def test_training_that_rises_while_validation_falls_is_gaming_the_grader(gamed):
    """If training falls along with validation, it is something else."""
    better = after(20, lambda n, value: min(1.0, value + 0.3) if gamed else value)
    lines = steps(accuracy=better)
    validations = Validations({0: 0.6, 20: 0.65, 40: 0.5}, 500)
    expected = {40: ["hacking"]} if gamed else {}
    assert alarms_of(lines, validations) == expected
    assert alarms_of(lines, Validations(validations.accuracy, 20)) == {}  # 20 problems cannot tell


def test_one_odd_step_is_no_trend():
    odd = {"length": lambda step, value: value * (20 if step == 40 else 1)}
    assert alarms_of(steps(**odd)) == {}


def test_an_alarm_that_is_off_says_nothing():
    lines = steps(length=after(30, lambda _, value: value * 4))
    assert alarms_of(lines, config=AlarmsConfig(length="off")) == {}


def test_what_a_step_lacks_is_left_out():
    """GRPO has no teacher; a run without a reference answer no accuracy."""
    lines = [{key: value for key, value in line.items() if not key.startswith(("teacher/", "opd/div", "rollout/acc"))}
             for line in steps(length=after(30, lambda _, value: value * 4))]  # fmt: skip
    assert alarms_of(lines) == {33: ["length"]}
    assert on([], QUIET, AlarmsConfig()) == {}


def test_a_run_that_was_cut_and_repeated_finds_the_same():
    lines = steps(entropy=after(30, lambda _, value: value * 8))
    repeated = lines[:25] + [dict(line) for line in lines[25:]]
    assert alarms_of(repeated) == alarms_of(lines)


def test_every_alarm_has_a_curve_here():
    assert {*BROKEN, "hacking"} == set(ALARMS)
