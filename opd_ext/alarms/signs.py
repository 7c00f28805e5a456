# SPDX-License-Identifier: Apache-2.0
"""Signs that a training run goes wrong, found in its metrics.

A sign is a change, not a value: how large an entropy or a divergence ought to be depends on model and method. The last
steps are held against the median of those before, in units of their noise (from the median change between neighbours),
and must be beyond it by a factor as well: neither a calm curve nor a noisy one, nor a slow trend, is enough.

:func:`on` is a function of the recorded steps alone, so a resumed run finds the same alarms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from opd_ext.alarms.config import FEWEST, AlarmsConfig
from opd_ext.checkpoints.best import STANDARD_ERRORS, best_step

WATCHED = (
    "opd/student_entropy",
    "actor/entropy",
    "rollout/tokens_mean",
    "rollout/accuracy",
    "rollout/samples",
    "rollout/stopped",
    "opd/loss",
    "opd/grad_norm",
    "opd/divergence",
    "opd/skipped",
    "teacher/samples",
    "teacher/age",
)
"""The metrics of a step that alarms read."""

_NORMAL = 1.4826
"""Median of absolute values -> standard deviation of normal ones."""

_START = 5
"""Steps that stand for the beginning of a run."""

_DEAD = 10
"""Steps in a row without a teacher. SDPO begins with some where the task is hard; ten are not bad luck."""


@dataclass(frozen=True)
class Validations:
    """Step -> accuracy, as a share, and the number of problems of each."""

    accuracy: Mapping[int, float]
    problems: int


def raised(steps: Sequence[Mapping[str, float]], validations: Validations, config: AlarmsConfig) -> dict[str, str]:
    """Alarms that the last step raises, with the reason: :func:`on` now, and at none of the steps of a window before.

    So a curve that stays where it should not, or goes to and fro about a limit, is one alarm.
    """
    found = on(steps, validations, config)
    for count in range(len(steps) - 1, max(0, len(steps) - 1 - config.window), -1):
        if not found:
            break
        last = steps[count - 1]["step"]
        seen = {at: share for at, share in validations.accuracy.items() if at <= last}
        earlier = on(steps[:count], Validations(seen, validations.problems), config)
        found = {alarm: why for alarm, why in found.items() if alarm not in earlier}
    return found


def on(steps: Sequence[Mapping[str, float]], validations: Validations, config: AlarmsConfig) -> dict[str, str]:
    """Alarms that are on after the last of the steps: name -> reason.

    Args:
        steps: lines of phase ``train`` of ``metrics.jsonl``, in order; metrics that a step lacks are left out.
        validations: up to that step.
    """
    found = {
        "entropy": _entropy(steps, config),
        "length": _length(steps, config),
        "accuracy": _accuracy(steps, config),
        "divergence": _divergence(steps, config),
        "teacher": _teacher(steps),
        "hacking": _hacking(steps, validations, config),
    }
    return {alarm: why for alarm, why in found.items() if why and config.action(alarm) != "off"}


def _series(steps: Sequence[Mapping[str, float]], *names: str) -> list[float]:
    """Finite values of the first of the metrics that a step has."""
    found = (next((step[name] for name in names if name in step), math.nan) for step in steps)
    return [value for value in found if math.isfinite(value)]


def _split(values: Sequence[float], config: AlarmsConfig) -> tuple[list[float], float, float] | None:
    """The last values, and median and spread of the window before them; None while that is too short."""
    recent = list(values[-config.persist :])
    past = values[: -config.persist][-config.window :]
    if len(past) < FEWEST:
        return None
    return recent, median(past), _spread(past)


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of the noise on a curve: from steps next to each other, so that a trend is no noise."""
    return _NORMAL * median(abs(b - a) for a, b in zip(values, values[1:], strict=False)) / math.sqrt(2)


def _ratio(values: Sequence[float], factor: float, config: AlarmsConfig) -> tuple[float, float] | None:
    """Median before and last value, of a positive quantity that has changed by ``factor``; None if it has not."""
    parts = _split([math.log(max(value, 1e-12)) for value in values], config)
    if parts is None:
        return None
    recent, middle, spread = parts
    limit = max(math.log(factor), config.spread * spread)
    beyond = all(value - middle > limit for value in recent) or all(middle - value > limit for value in recent)
    return (math.exp(middle), values[-1]) if beyond else None


def _entropy(steps: Sequence[Mapping[str, float]], config: AlarmsConfig) -> str | None:
    values = _series(steps, "opd/student_entropy", "actor/entropy")
    if jump := _ratio(values, config.entropy_factor, config):
        return f"the student's entropy is {jump[1]:.3g} nats and was {jump[0]:.3g} in the steps before"
    if len(values) >= _START + FEWEST:
        first = median(values[:_START])
        if first > 0 and all(value < 0.1 * first for value in values[-config.persist :]):
            return f"the student's entropy has fallen to {values[-1]:.3g} nats, from {first:.3g} in the first steps"
    return None


def _length(steps: Sequence[Mapping[str, float]], config: AlarmsConfig) -> str | None:
    if any(_series(steps, "rollout/stopped")):
        return None  # it is the horizon that their lengths follow
    if jump := _ratio(_series(steps, "rollout/tokens_mean"), config.length_factor, config):
        return f"responses have {jump[1]:.0f} tokens and had {jump[0]:.0f} in the steps before"
    return None


def _accuracy(steps: Sequence[Mapping[str, float]], config: AlarmsConfig) -> str | None:
    values = _series(steps, "rollout/accuracy")
    parts = _split(values, config)
    if parts is None:
        return None
    recent, middle, spread = parts
    # Shares of few rollouts may not vary for a while; their chance does.
    rollouts = _series(steps[-1:], "rollout/samples") or [1.0]
    spread = max(spread, math.sqrt(max(middle * (1 - middle), 0.0) / rollouts[0]))
    # Against a mean of several steps, whose chance is smaller; a share cannot fall by six spreads from everywhere.
    limit = max(config.accuracy_drop * middle, min(config.spread, STANDARD_ERRORS) * spread)
    if middle > 0 and all(middle - value > limit for value in recent):
        return f"{values[-1]:.1%} of the training rollouts are right and {middle:.1%} were in the steps before"
    return None


def _divergence(steps: Sequence[Mapping[str, float]], config: AlarmsConfig) -> str | None:
    last = steps[-1] if steps else {}
    for name in ("opd/loss", "opd/grad_norm", "opd/divergence"):
        if not math.isfinite(last.get(name, 0.0)):
            return f"{name} is {last[name]}"
    parts = _split(_series(_since_refresh(steps), "opd/divergence"), config)
    if parts is None:
        return None
    recent, middle, spread = parts
    limit = max((config.divergence_factor - 1) * abs(middle), config.spread * spread)
    if all(value - middle > limit for value in recent):
        return f"the divergence is {recent[-1]:.3g} nats per token and was {middle:.3g} in the steps before"
    return None


def _since_refresh(steps: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Steps with the present teacher; all, where it moves at every step and no step differs from its neighbours."""
    ages = [step.get("teacher/age", 0.0) for step in steps]
    for i in range(len(ages) - 1, 0, -1):
        if ages[i] < ages[i - 1] and ages[i - 1] > 0:
            return steps[i:]
    return steps


def _teacher(steps: Sequence[Mapping[str, float]]) -> str | None:
    last = steps[-_DEAD:]
    if len(last) == _DEAD and all(step.get("teacher/samples") == 0 for step in last):
        return f"no rollout of the last {_DEAD} steps has a teacher"
    if len(last) == _DEAD and all(step.get("opd/skipped") == 1 for step in last):
        return f"the last {_DEAD} steps had nothing to train on"
    return None


def _hacking(steps: Sequence[Mapping[str, float]], validations: Validations, config: AlarmsConfig) -> str | None:
    best = best_step(dict(validations.accuracy))
    if best is None or best == max(validations.accuracy) or not steps:
        return None
    then, now = validations.accuracy[best], validations.accuracy[max(validations.accuracy)]
    mean = (then + now) / 2
    if then - now <= STANDARD_ERRORS * math.sqrt(2 * mean * (1 - mean) / max(validations.problems, 1)):
        return None
    before = _series([step for step in steps if step["step"] <= best][-config.window :], "rollout/accuracy")
    after = _series([step for step in steps if step["step"] > best][-config.window :], "rollout/accuracy")
    if len(before) < FEWEST or len(after) < FEWEST:
        return None
    middle, spread = median(before), _spread(before)
    # A median of n values varies by about 1.25 / sqrt(n) of their spread.
    if median(after) - middle <= STANDARD_ERRORS * 1.25 * spread / math.sqrt(min(len(before), len(after))):
        return None
    return (
        f"training rollouts went from {middle:.1%} to {median(after):.1%} right while validation fell from {then:.1%} "
        f"(step {best}) to {now:.1%}"
    )
