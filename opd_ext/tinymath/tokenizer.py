# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the miniature world: a genuine byte-level BPE fast tokenizer of some 400 entries.

Real prompts cost a few tokens here because every fixed sentence of the published prompts is *one* token,
the limit of what BPE merges would do; the strings themselves stay byte for byte those of the papers.
Words of the world are tokens, digits are single, and any other text falls back to bytes, so everything
round-trips.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_ext.context import prompts
from opd_ext.tinymath import grader, problems, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_PIECES = r" ?[A-Za-z]+|\s|."


def prompt_phrases() -> list[str]:
    """The pieces of the published prompts that are one token each."""
    templates = [*prompts.PCT_TEMPLATE.split("{p}"), *prompts.WORDS_TEMPLATE.split("{n}")]
    return [
        prompts.STUDENT_HEADER,
        f"\n\n{prompts.ANSWER_CLAUSE}\n\n",
        prompts.REMINDER,
        *prompts.INSTRUCTIONS.values(),
        *templates,
        "Problem: ",
        prompts.OPSD_BOXED,
        prompts.OPSD_SOLUTION_OPENING,
        prompts.OPSD_SOLUTION_CLOSING,
        prompts.OPSD_GUARD,
        prompts.SDPO_SOLUTION_OPENING,
        prompts.SDPO_FEEDBACK_OPENING,
        prompts.SDPO_CLOSING,
        prompts.LABEL_ERROR_OPENING,
        prompts.LABEL_ERROR_CLOSING,
        prompts.LABEL_STEP_OPENING,
        prompts.LABEL_STEP_CLOSING,
        *(f"- {sentence}" for sentence in (*prompts.STEP_TYPES.values(), *prompts.ERROR_TYPES.values())),
    ]


def phrases() -> list[str]:
    """The fixed strings that are one token each, published prompt pieces and the world's line openings."""
    return [
        *prompt_phrases(),
        problems.QUESTION_OPENING,
        problems.ANSWER_OPENING,
        *(f"{label}: " for label in (*problems.PLACES, problems.REWRITE)),
    ]


def words() -> list[str]:
    """The words of the world (a leading blank belongs to the word), sorted."""
    return words_of([writing.LOOK_AGAIN, writing.RESTATE, *writing.MUSINGS, *grader.FEEDBACK.values()])


def words_of(sentences: Sequence[str]) -> list[str]:
    """The words of a world's sentences and of what every world says, sorted."""
    sentences = [*sentences, "user", "assistant", "system", prompts.STUDENT_OPENING, prompts.ANSWER_CLAUSE]
    return sorted({piece for text in sentences for piece in re.findall(_PIECES, text) if len(piece) > 1})


def make_tokenizer(
    own_phrases: Sequence[str] | None = None, own_words: Sequence[str] | None = None
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; ``len(tokenizer)`` is the vocabulary size that the models use.

    Args:
        own_phrases: fixed strings that are one token each; by default those of the first level.
        own_words: words that are one token each, likewise.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + [word.replace(" ", "Ġ") for word in own_words or words()]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in own_phrases or phrases()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
