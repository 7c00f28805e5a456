# SPDX-License-Identifier: Apache-2.0
"""The pre-training corpus of the tools' level: chats of several turns in the published prompt formats.

As on the other levels the contexts of self-distillation teachers occur, and what they do to the rollout is what makes
them worth reading: an instruction takes away filler and second looks; a solution in the prompt keeps its reader from
most slips; feedback gets the term right that it names, or has the sum worked out that was missing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from opd_ext.context import prompts
from opd_ext.tinymath.chats import Chat, Corpus
from opd_ext.tinymath.tokenizer import TURN_END, TURN_START
from opd_ext.tinymath.tools.grader import FEEDBACK, describe
from opd_ext.tinymath.tools.problems import DIFFICULTIES, draw_question, parse, solve
from opd_ext.tinymath.tools.writing import VERBOSE, Author, transcript

TEXT_IDS = ("v1", "v2")
CONCISE = 0.04
WITH_SOLUTION, WITH_FEEDBACK, WITH_NOTE = 0.05, 0.5, 0.4
"""What is left of the rates of slips under each of these contexts."""


@dataclass(frozen=True)
class ToolCorpus(Corpus):
    """As on the first level; questions are bills."""

    def question(self, rng: random.Random, index: int) -> tuple[int, str]:
        difficulty = DIFFICULTIES[index % len(DIFFICULTIES)]
        return difficulty, draw_question(rng, difficulty)

    def chat(self, rng: random.Random, question: str, difficulty: int) -> Chat:
        return draw_chat(rng, question, difficulty, self)


def textbook() -> ToolCorpus:
    """Brief and without slips: nearly every token teaches to copy, to call, or to read the prompt."""
    return ToolCorpus({"student": 0.3, "instruction": 0.3, "opsd": 0.15, "sdpo": 0.25}, TEXT_IDS, 0.05, 0.0)


def chats(slip_scale: float = 1.0) -> ToolCorpus:
    """The habits that the finished model has."""
    mixture = {"student": 0.4, "instruction": 0.2, "opsd_student": 0.03, "opsd": 0.1, "sdpo": 0.22, "label": 0.05}
    return ToolCorpus(mixture, (*TEXT_IDS, "v2"), VERBOSE, slip_scale)


def decisive_types(question: str) -> list[str]:
    """TRACE's types of what decides a bill: the sum."""
    parse(question)
    return ["key_formula"]


def draw_chat(rng: random.Random, question: str, difficulty: int, corpus: Corpus) -> Chat:
    """A chat about ``question``, its kind drawn from the mixture of the corpus."""
    (kind,) = rng.choices(list(corpus.mixture), list(corpus.mixture.values()))
    author = Author(0.0).brief(corpus.filler).careful(corpus.slip_scale)
    if kind == "instruction":
        author = author.brief(CONCISE)
        # The released CRISP preparation repeats the reminder; the world knows both forms.
        shown = question if rng.random() < 0.9 else question + prompts.REMINDER
        shown = prompts.teacher_prompt(shown, rng.choice(corpus.text_ids))
    elif kind == "opsd":
        shown = prompts.opsd_teacher_prompt(question, _correct(rng, question))
        author = author.careful(WITH_SOLUTION)
    elif kind == "label":
        correct = rng.random() < 0.7
        types = decisive_types(question) if correct else ["arithmetic_slip"]
        shown = prompts.label_prompt(prompts.student_prompt(question), types, correct)
        author = author.careful(WITH_NOTE)
    elif kind == "sdpo":
        shown, author = _reprompted(rng, question, author)
    elif kind == "opsd_student":
        shown = prompts.opsd_student_prompt(question)
    else:
        shown = prompts.student_prompt(question)
    return Chat(shown, transcript(question, author, rng).as_reply(TURN_START, TURN_END))


def _reprompted(rng: random.Random, question: str, author: Author) -> tuple[str, Author]:
    """SDPO's second attempt, with a solution, with feedback on what went wrong in a first one, or with both."""
    shows_solution, shows_feedback = rng.choice(((True, False), (False, True), (False, True), (True, True)))
    solution = _correct(rng, question) if shows_solution else None
    feedback = None
    if shows_feedback:
        feedback, told = _mistake(rng, question)
        author = replace(author.careful(WITH_FEEDBACK), told=told)
    if shows_solution:
        author = author.careful(WITH_SOLUTION / WITH_FEEDBACK if shows_feedback else WITH_SOLUTION)
    return prompts.sdpo_prompt(prompts.student_prompt(question), solution, feedback), author


def _mistake(rng: random.Random, question: str) -> tuple[str, int]:
    """Feedback on something that an ordinary author might have got wrong, and what it names."""
    expression, _ = solve(question)
    if rng.random() < 0.25:
        return FEEDBACK["no_sum"].format(expression=expression), -1
    _, terms = parse(question)
    ordinary = Author(0.0)
    (wrong,) = rng.choices(range(len(terms)), [ordinary.slip(i, quantity) for i, (quantity, _) in enumerate(terms)])
    stated = expression.split("+")
    stated[wrong] = "0*0"
    return describe(question, "+".join(stated)), wrong


def _correct(rng: random.Random, question: str) -> str:
    """A reference solution, or a successful rollout with its filler, as SDPO shows it."""
    filler = 0.0 if rng.random() < 0.5 else VERBOSE
    return transcript(question, Author(0.0).brief(filler).careful(0.0), rng).as_text()
