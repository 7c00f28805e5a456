# SPDX-License-Identifier: Apache-2.0
"""The reward function, imported and called once on the first row, before a thousand rollouts wait for it."""

import asyncio
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import Findings, refuse
from opd_ext.preflight.tables import Samples
from opd_ext.rewards.load import load_function

KEY = "reward.custom_reward_function"
SECONDS = 10.0  # a judge behind a network may take longer: then nothing is said against it
_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def check_reward(config: DictConfig, graded: Sequence[Samples], findings: Findings, here: bool = True) -> None:
    """Load the user's function, and let it grade an empty response to the first row of ``graded``.

    If the function's module has a ``check_machine``, that says what the grader needs of this machine, and if it has a
    ``check_reference``, that is asked about every reference that was read.

    Args:
        graded: files with references.
        here: the run starts on this machine; if not, what this one lacks is a note.

    Raises:
        ConfigError: it cannot be imported, takes other arguments, raises, returns no score, or lacks what it needs.
    """
    custom = config.reward.custom_reward_function
    if not custom.path:
        return
    shown, always = f"{KEY}.path={custom.path}, name={custom.name},", dict(custom.get("reward_kwargs") or {})
    try:
        function = load_function(custom.path, custom.name)
    except (Exception, SystemExit) as error:
        raise refuse(f"{shown} cannot be loaded", error) from None
    _check(config, graded, findings, here, shown, function, always)


def check_verls(config: DictConfig, graded: Sequence[Samples], findings: Findings, here: bool = True) -> None:
    """The same of what needs verl: the reward manager, and verl's own grader where the configuration names none.

    Raises:
        ConfigError: as :func:`check_reward`.
    """
    from opd_ext.bridge.inputs import default_grader

    try:
        function = default_grader(config)
    except (Exception, SystemExit) as error:
        raise refuse(
            f"reward.reward_manager.name={config.reward.reward_manager.name} cannot be loaded", error
        ) from None
    if not config.reward.custom_reward_function.path:
        _check(config, graded, findings, here, f"verl's grader ({KEY}.path is null)", function, {})


def _check(
    config: DictConfig,
    graded: Sequence[Samples],
    findings: Findings,
    here: bool,
    shown: str,
    function: Callable[..., Any],
    always: Mapping[str, Any],
) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(_ARGUMENTS), **always)
    except TypeError as error:
        raise refuse(f"{shown} must take {', '.join((*_ARGUMENTS, *always))}", error) from None
    _check_machine(function, always, findings, here)
    manager = config.reward.reward_manager.source
    if not graded or config.reward.reward_model.enable or manager != "register":
        return  # a model that grades is not up yet; a manager of the user's calls the function as it likes
    _check_references(function, graded)
    row = graded[0].sample[0]
    source, answer = row.get("data_source"), row["reward_model"]["ground_truth"]
    extra_info = dict(row.get("extra_info") or {}) | {"num_turns": 2, "rollout_reward_scores": {}}  # as verl does
    given = dict(zip(_ARGUMENTS, (source, "", answer, extra_info), strict=True)) | always
    finished, result = _within(lambda: _call(function, given))
    if not finished:
        findings.note(f"{shown} took more than {SECONDS:.0f} s for one empty response: a step waits for all of them.")
    elif isinstance(result, ConnectionError):
        findings.note(f"{shown} does not reach what it asks ({result}): it must be up when the run starts.")
    elif isinstance(result, BaseException):
        raise refuse(f"{shown} fails on the first row, data_source={source} and ground_truth={answer!r:.60}", result)
    else:
        _check_score(shown, result)


def _check_machine(function: Callable[..., Any], always: Mapping[str, Any], findings: Findings, here: bool) -> None:
    check = getattr(inspect.getmodule(function), "check_machine", None)
    if check is None:
        return
    try:
        findings.fact("programs run in", check(**always))
    except RuntimeError as error:
        if here:
            raise ConfigError(str(error)) from None
        findings.note(f"{str(error).rstrip('.')} - unless the run has another machine.")


def _check_references(function: Callable[..., Any], graded: Sequence[Samples]) -> None:
    check = getattr(inspect.getmodule(function), "check_reference", None)
    for samples in graded if check else ():
        faults = {}
        for i, row in enumerate(samples.sample):
            try:
                check(row["reward_model"]["ground_truth"])
            except ValueError as error:
                faults[i] = error
        if faults:
            first, fault = next(iter(faults.items()))
            raise ConfigError(
                f"{samples.name}: {len(faults)} of {len(samples.sample)} rows cannot be graded, the first is row "
                f"{first}: {fault}"
            )


def _call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    result = function(**given)
    return asyncio.run(_await(result)) if inspect.isawaitable(result) else result


async def _await(result: Any) -> Any:
    return await result


def _within(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether ``work`` ended in time, and what it returned or raised; verl calls graders from threads, too."""
    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append(work())
        except (Exception, SystemExit) as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(outcome), outcome[0] if outcome else None


def _check_score(shown: str, result: Any) -> None:
    if isinstance(result, Mapping) and "score" not in result:
        raise ConfigError(f"{shown} returns a dict without 'score': it has {', '.join(map(str, result)) or 'nothing'}.")
    score = result["score"] if isinstance(result, Mapping) else result
    if not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise ConfigError(f"{shown} returns {score!r:.60} for the first row: a score must be a finite number.")
