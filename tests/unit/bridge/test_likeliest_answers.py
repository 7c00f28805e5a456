# SPDX-License-Identifier: Apache-2.0
"""What verl's teacher servers answer is looked at before anything is learned from it."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import RayActorError

from opd_ext.bridge import likeliest
from opd_ext.errors import RunError


def answer(tokens: int = 7, k: int = 4, vocabulary: int = 50):
    """As vLLM gives it: float32 log-probs of a softmax, and verl's filler in the last row."""
    logits = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(3))
    log_probs, ids = logits.log_softmax(-1).topk(k)
    ids[-1], log_probs[-1] = 0, 0.0
    return ids.int(), log_probs


def test_an_answer_is_accepted_as_it_comes():
    likeliest.check_answer(*answer(), 4)
    likeliest.check_answer(*answer(k=1), 1)
    likeliest.check_answer(*answer(tokens=1), 4)  # nothing but the filler
    likeliest.check_answer(*answer(k=50), 50)  # all there are: they add up to 1, rounded
    likeliest.check_ids(answer()[0], 50)


def fewer(ids, log_probs):
    return ids[:, :3], log_probs[:, :3]


def of_another_shape(ids, log_probs):
    return ids[:, :3], log_probs


def not_finite(ids, log_probs):
    return ids, log_probs.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(float("-inf")))


def not_numbers(ids, log_probs):
    return ids, log_probs.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(float("nan")))


def doubled(ids, log_probs):
    ids = ids.clone()
    ids[2, 3] = ids[2, 0]
    return ids, log_probs


def turned_round(ids, log_probs):
    return ids, log_probs.flip(-1)


def logits(ids, log_probs):
    return ids, log_probs + 9.0


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (fewer, r"asked for 4 likeliest tokens of every position, and answers with ids \[7, 3\]"),
        (of_another_shape, r"ids \[7, 3\] and log-probs \[7, 4\]"),
        (not_finite, "not finite, first of token 3 of 7"),
        (not_numbers, "not finite, first of token 3 of 7"),
        (doubled, "the same token twice, first of token 3"),
        (turned_round, "not in order"),
        (logits, "add up to more than 1"),
    ],
)
def test_what_is_no_answer_is_refused_in_one_sentence(lie, said):
    with pytest.raises(RunError, match=said):
        likeliest.check_answer(*lie(*answer()), 4)


def test_a_token_that_the_student_has_not_is_refused():
    ids, _ = answer()
    with pytest.raises(RunError, match=rf"names token {int(ids.max())}, and the student's projection has 10 rows"):
        likeliest.check_ids(ids, 10)


def test_a_server_that_fails_is_named_and_one_that_died_is_left_to_who_looks_after_it():
    async def scoring(error):
        raise error

    output = SimpleNamespace(extra_fields={})
    said = "verl's teacher server has not given 4 likeliest tokens of every position: AssertionError: 3"
    with pytest.raises(RunError, match=said):
        asyncio.run(likeliest.answered(scoring(AssertionError(3)), output, 4))
    with pytest.raises(RayActorError):
        asyncio.run(likeliest.answered(scoring(RayActorError()), output, 4))
