# SPDX-License-Identifier: Apache-2.0
"""Rollouts that a grader, a tool or an agent loop could not finish: each is a row that says so, and none is missing."""

from collections.abc import Callable
from typing import Any

from transfer_queue import KVBatchMeta
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

from opd_ext.bridge.console import ALARM
from opd_ext.credit.annotate import FAILURES
from opd_ext.errors import RunError

FAILURE = "opd_failure"
"""Under which name a rollout that failed carries its exception, in words."""

FRUITLESS = 3
"""Steps in a row without a pair that fits, after which a run ends."""

_UNGRADED = {"acc": 0.0}  # the grade of a rollout that has none


def in_words(error: BaseException) -> str:
    """Type and message of an exception on one line; of the exception in another process, where Ray brought it."""
    cause = error
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def mark_ungraded(output: AgentLoopOutput, error: BaseException) -> None:
    """A response that was sampled and could not be graded scores 0."""
    output.reward_score = 0.0
    output.extra_fields.update({FAILURE: in_words(error), "reward_extra_info": dict(_UNGRADED)})


def unfinished(prompt_ids: list[int], eos: int, error: BaseException) -> AgentLoopOutput:
    """What stands for a rollout without a response: one token that is not trained, as verl fills a batch up."""
    return AgentLoopOutput(
        prompt_ids=prompt_ids,
        response_ids=[eos],
        response_mask=[0],
        response_logprobs=[0.0],
        reward_score=0.0,
        num_turns=0,
        metrics=AgentLoopMetrics(),
        extra_fields={
            FAILURE: in_words(error),
            "reward_extra_info": dict(_UNGRADED),
            "turn_scores": [],
            "tool_rewards": [],
        },
    )


def account(
    rows: list[dict[str, Any]], wanted: int, choice: str, prefix: str, first_exception: Callable[[], str | None]
) -> tuple[dict[str, float], str]:
    """Every rollout that was asked for is there, and those that failed are counted.

    Args:
        rows: of :func:`opd_ext.bridge.rollouts.read_rows`.
        wanted: prompts x samples.
        choice: ``opd.rollout.failed``.
        prefix: ``rollout`` or ``val``.
        first_exception: asked only where rows are missing.

    Returns:
        ``<prefix>/failed``, a share; a line for the console, empty where nothing failed.

    Raises:
        RuntimeError: rows are missing, all failed, or one did and ``choice`` is stop.
    """
    found = len({(row["uid"], row["sample"]) for row in rows})
    if found != wanted:
        raise RuntimeError(missing(wanted - found, wanted, first_exception()))
    failed = [row for row in rows if row["failed"]]
    if not failed:
        return {f"{prefix}/failed": 0.0}, ""
    first = failed[0]
    where = f"data_source {first['data_source']}, index {first['index']}, sample {first['sample']}"
    count = f"{len(failed)} of {len(rows)} rollouts could not be finished or graded"
    line = f"{count}; the first: {first['failed']} ({where})"
    if choice == "stop":
        raise RuntimeError(f"{line}: mend the reward function or tool, or set opd.rollout.failed=zero to score them 0.")
    if len(failed) == len(rows):
        raise RuntimeError(f"{line}: none is left to learn from, so the reward function or agent loop is broken.")
    return {f"{prefix}/failed": len(failed) / len(rows)}, line


def account_annotations(rows: list[dict[str, Any]], choice: str) -> str:
    """Annotations that failed, and why the first of them did.

    Args:
        rows: of :func:`opd_ext.bridge.rollouts.read_rows`; those that nobody was asked about have no ``annotation``.
        choice: ``opd.credit.annotator.failed``.

    Returns:
        A line for the console, empty where few or none failed.

    Raises:
        RuntimeError: all failed and ``choice`` is stop.
    """
    found = [row["annotation"] for row in rows if row.get("annotation")]
    asked = [one for one in found if one["called"] or one["status"] in FAILURES]
    failed = [one for one in asked if one["status"] in FAILURES]
    if not failed or len(failed) < ALARM * len(asked):
        return ""
    line = f"{len(failed)} of {len(asked)} annotations failed; the first: {failed[0]['status']}, {failed[0]['cause']}"
    if len(failed) == len(asked) and choice == "stop":
        raise RuntimeError(
            f"{line}: mend the annotator and run the command again, which goes on from the last checkpoint, or set "
            "opd.credit.annotator.failed=plain to train such steps without spans."
        )
    return line


def sample(buffer: Any, manager: Any, step: int, partition: str, prompts: int) -> tuple[KVBatchMeta, dict[str, Any]]:
    """The finished rollouts of so many prompts, from verl's replay buffer.

    Raises:
        RuntimeError: none arrived, with what the first of them raised.
        RunError: none will (:mod:`opd_ext.bridge.liveness`).
    """
    try:
        return buffer.sample(global_steps=step, partition_id=partition, batch_size=prompts)
    except RunError:
        raise
    except RuntimeError as error:
        if exception := manager.first_exception():
            raise RuntimeError(f"no rollout of step {step} arrived; the first exception: {exception}") from error
        raise


def check_pairs(metrics: dict[str, float], before: int, limit: int) -> int:
    """How many steps in a row have had nothing but pairs that are too long, this one included.

    Args:
        metrics: of this step's teacher inputs.
        before: the same number, of the step before.
        limit: ``opd.max_pair_length``.

    Raises:
        RuntimeError: it is the third.
    """
    if metrics["rollout/too_long"] < 1:
        return 0
    if before + 1 == FRUITLESS:
        raise RuntimeError(
            f"Not one pair of the last {FRUITLESS} steps fits opd.max_pair_length={limit}: the longest teacher prompt "
            f"has {metrics['teacher/prompt_tokens_max']:.0f} tokens, before any response. Raise opd.max_pair_length "
            "(and what must hold a pair: ppo_max_token_len_per_gpu), or shorten what the context shows."
        )
    return before + 1


def missing(count: int, wanted: int, exception: str | None) -> str:
    """What a run says that ends because rollouts did not arrive."""
    return f"{count} of {wanted} rollouts are missing; the first exception: {exception or 'none was raised'}"
