# SPDX-License-Identifier: Apache-2.0
"""The likeliest tokens that verl's teacher servers name: what an answer must be, and where it lies in a batch.

verl asks for them as vLLM's ``prompt_logprobs``; row j of an answer is what the teacher says of token j + 1.
"""

from collections.abc import Awaitable
from typing import Any

from ray.exceptions import RayActorError
from tensordict import TensorDict
from torch import Tensor

from opd_ext.bridge.failures import in_words
from opd_ext.divergence.known import TopK
from opd_ext.errors import RunError

IDS, LOG_PROBS = "teacher_ids", "teacher_logprobs"
"""Columns of a batch, and fields of a rollout, in which verl leaves them."""

_SUM = 1e-3
"""So much more than 1 the probabilities of an answer may add up to: k log-probs, each rounded in float32."""


def check_answer(ids: Tensor, log_probs: Tensor, k: int) -> None:
    """Refuse what are not the log-probs of the k likeliest tokens; the last row, of no token, is verl's filler.

    Args:
        ids: [S, K] int32, of a sequence of S tokens.
        log_probs: [S, K] float32.

    Raises:
        RunError: one sentence.
    """
    who = "verl's teacher server"
    if ids.shape != log_probs.shape or ids.ndim != 2 or ids.shape[1] != k:
        raise RunError(
            f"{who} was asked for {k} likeliest tokens of every position, and answers with ids {list(ids.shape)} and "
            f"log-probs {list(log_probs.shape)}: what answers is not a server of verl's that knows prompt_logprobs."
        )
    said, named = log_probs[:-1].double(), ids[:-1].sort(dim=-1).values
    total = said.exp().sum(dim=-1)
    faults = {
        "log-probs that are not finite": ~said.isfinite().all(dim=-1),
        "the same token twice": (named.diff(dim=-1) == 0).any(dim=-1),
        "tokens that are not in order, the likeliest first": (said.diff(dim=-1) > 0).any(dim=-1),
        "probabilities that add up to more than 1": total > 1 + _SUM,
    }
    for fault, where in faults.items():
        if where.any():
            row = int(where.nonzero()[0])
            raise RunError(
                f"{who} answers with {fault}, first of token {row + 1} of {len(ids)}, of which no divergence can be "
                "computed: look at its engine_kwargs (quantization, logprobs_mode), or set opd.teacher.backend=vllm."
            )


async def answered(scoring: Awaitable[None], output: Any, k: int) -> None:
    """Wait for a server to score a rollout, and look at what it says.

    Raises:
        RunError: it fails, or :func:`check_answer` refuses the answer.
    """
    try:
        await scoring
    except RayActorError:  # a dead server is another story
        raise
    except Exception as error:
        raise RunError(
            f"verl's teacher server has not given {k} likeliest tokens of every position: {in_words(error)}"
        ) from error
    check_answer(output.extra_fields[IDS], output.extra_fields[LOG_PROBS], k)


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """The student has a row for every token that is named; ``ids`` [n, K].

    Raises:
        RunError: it has not, and its log-prob of that token is not defined.
    """
    if ids.numel() and (largest := int(ids.max())) >= vocabulary:
        raise RunError(
            f"verl's teacher server names token {largest}, and the student's projection has {vocabulary} rows: choose "
            "a teacher of the student's vocabulary, or set opd.teacher.backend=vllm, which compares the rows that both "
            "have."
        )


def read(data: TensorDict, rows: Tensor) -> dict[str, Tensor | TopK]:
    """What verl's servers have said of the tokens that ``rows`` [R] of the packed batch predict, as fields of a
    :class:`opd_ext.objective.batch.MicroBatch`."""
    if LOG_PROBS not in data:
        return {}
    log_probs = data[LOG_PROBS].values()[rows]
    if IDS in data:
        return {"teacher_topk": TopK(data[IDS].values()[rows].long(), log_probs)}
    return {"teacher_log_prob": log_probs[:, 0]}
