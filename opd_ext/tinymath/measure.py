# SPDX-License-Identifier: Apache-2.0
"""What a model of the miniature world does under a prompt: accuracy and length, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from opd_ext.tinymath.diffusion import sample_denoised
from opd_ext.tinymath.levels import FIRST, Level
from opd_ext.tinymath.pretrain import render_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MAX_NEW_TOKENS = 192

Problem = tuple[int, str, str]
"""Difficulty, question, answer."""


@dataclass(frozen=True)
class Outcome:
    """One sampled response: right or not (1.0 / 0.0) and its length in tokens, end of turn included."""

    difficulty: int
    text: str
    accuracy: float
    tokens: int


def is_diffusion(model: Qwen3ForCausalLM) -> bool:
    """Whether the model reconstructs hidden tokens instead of predicting the next one."""
    return getattr(model.config, "mask_token_id", None) is not None


def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    seed: int,
    max_new_tokens: int | None = None,
) -> list[list[int]]:
    """One response per user message at temperature 1 without truncation of the distribution.

    Returns token ids up to and including the end of turn, which is absent where ``max_new_tokens`` ran out, by default
    ``MAX_NEW_TOKENS``.
    """
    shown = tokenizer(render_requests(tokenizer, prompts)).input_ids
    if max_new_tokens is None:  # short ones: all at once
        return continue_from(model, tokenizer, shown, seed, MAX_NEW_TOKENS, batch_size=len(shown))
    return continue_from(model, tokenizer, shown, seed, max_new_tokens)


@torch.inference_mode()
def continue_from(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    shown: list[list[int]],
    seed: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """As :func:`sample`, behind token ids that may end within a response.

    The cache of a batch is copied at every token, so that long responses are sampled faster in small batches.
    """
    torch.manual_seed(seed)
    parts = [shown[start : start + batch_size] for start in range(0, len(shown), batch_size)]
    return [reply for part in parts for reply in _replies(model, tokenizer, part, max_new_tokens)]


def _replies(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, shown: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    batch = tokenizer.pad({"input_ids": shown}, return_tensors="pt")
    ids = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
    )
    replies = ids[:, batch.input_ids.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [reply[: reply.index(end) + 1] if end in reply else reply for reply in replies]


def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    prompts: list[str],
    seed: int,
    level: Level = FIRST,
) -> list[Outcome]:
    """Sample and grade one response per problem; a masked-diffusion model denoises it at temperature 0.

    Args:
        problems: what is asked.
        prompts: the user message shown for each problem.
        seed: of the sampling.
        level: whose grader, and how long a response may be.
    """
    outcomes = []
    if level.play is not None:
        shown = tokenizer(render_requests(tokenizer, prompts)).input_ids
        most = level.max_new_tokens or MAX_NEW_TOKENS
        replies = level.play(
            tokenizer, shown, lambda ids, turn: continue_from(model, tokenizer, ids, seed * 100 + turn, most)
        )
    elif is_diffusion(model):
        replies = [(ids, len(ids)) for ids in sample_denoised(model, tokenizer, prompts, MAX_NEW_TOKENS)]
    else:
        replies = [(ids, len(ids)) for ids in sample(model, tokenizer, prompts, seed, level.max_new_tokens)]
    for (difficulty, question, answer), (reply, written) in zip(problems, replies, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=True)
        grade = level.compute_score(level.name, text, answer, {"question": question})
        outcomes.append(Outcome(difficulty, text, float(grade["acc"]), written))
    return outcomes


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (normal approximation)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))
