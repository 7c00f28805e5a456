# SPDX-License-Identifier: Apache-2.0
"""The pre-training corpus of the second level: single-turn chats in the published prompt formats.

As on the first level every context of a self-distillation teacher occurs, and what it does to the reply is what makes
it worth reading: an instruction takes filler away; a solution in the prompt keeps its reader from most slips and lets
it notice the others; feedback gets the line that it names right and makes the rest half as likely to go wrong; a note
on the kind of step makes its reader careful.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from opd_ext.context import prompts
from opd_ext.tinymath.chats import BUDGETS, Chat, Corpus
from opd_ext.tinymath.long.diagnosis import ERRORS, decisive_types
from opd_ext.tinymath.long.grader import describe, kind_of_mistake
from opd_ext.tinymath.long.problems import DIFFICULTIES, concise_solution, draw_question, solve
from opd_ext.tinymath.long.writing import VERBOSE, Author, write_solution

CONCISE = 0.04
TEXT_IDS = ("v1", "v2")
WITH_SOLUTION, WITH_FEEDBACK, WITH_NOTE = 0.1, 0.5, 0.4
"""What is left of the rates of slips under each of these contexts. A solution leaves so little because a small model
learns to look a line up only where that settles a branch which calculation leaves open."""
NOTICE_WITH_SOLUTION = 0.8


@dataclass(frozen=True)
class LongCorpus(Corpus):
    """As on the first level; ``difficulties`` of its questions come in turn, ``notice`` is a habit of its authors."""

    difficulties: tuple[int, ...] = tuple(DIFFICULTIES)
    notice: float = 0.0

    def question(self, rng: random.Random, index: int) -> tuple[int, str]:
        difficulty = self.difficulties[index % len(self.difficulties)]
        return difficulty, draw_question(rng, difficulty)

    def chat(self, rng: random.Random, question: str, difficulty: int) -> Chat:
        return draw_chat(rng, question, difficulty, self)


def textbook() -> LongCorpus:
    """Short chains, concise and without slips: nearly every token teaches to calculate, compare, or to read the prompt.

    Whoever cannot calculate yet copies from a solution: what is in the prompt is best learned here.
    """
    mixture = {"student": 0.42, "instruction": 0.14, "opsd": 0.14, "sdpo": 0.3}
    return LongCorpus(mixture, TEXT_IDS, 0.05, 0.0, difficulties=(0,))


def chats(slip_scale: float = 1.0, notice: float = 0.0) -> LongCorpus:
    """The habits that the finished model has."""
    mixture = {"student": 0.33, "instruction": 0.12, "opsd_student": 0.03, "opsd": 0.17, "sdpo": 0.27, "label": 0.08}
    return LongCorpus(mixture, (*TEXT_IDS, "v2", "pct", "words"), VERBOSE, slip_scale, notice=notice)


def filler_probability(text_id: str) -> float:
    """How probable filler is at each line under an instruction (``VERBOSE`` without one)."""
    kind, _, amount = text_id.partition("-")
    if kind == "pct":
        return VERBOSE * (1 - int(amount) / 100)
    if kind == "words":
        return min(VERBOSE, VERBOSE * int(amount) / 100)
    return CONCISE


def draw_chat(rng: random.Random, question: str, difficulty: int, corpus: Corpus) -> Chat:
    """A chat about ``question``, its kind drawn from the mixture of the corpus."""
    (kind,) = rng.choices(list(corpus.mixture), list(corpus.mixture.values()))
    author = Author(corpus.filler, notice=corpus.notice).careful(corpus.slip_scale)
    if kind == "instruction":
        text_id = rng.choice(corpus.text_ids)
        if text_id in BUDGETS:
            text_id = f"{text_id}-{rng.choice(BUDGETS[text_id])}"
        author = replace(author, filler=filler_probability(text_id))
        # The released CRISP preparation repeats the reminder; the world knows both forms.
        shown = prompts.teacher_prompt(question if rng.random() < 0.9 else question + prompts.REMINDER, text_id)
    elif kind == "opsd":
        shown = prompts.opsd_teacher_prompt(question, _correct_solution(rng, question))
        author = _informed(author)
    elif kind == "label":
        shown, author = _noted(rng, question, author)
    elif kind == "sdpo":
        shown, author = _reprompted(rng, question, author)
    elif kind == "opsd_student":
        shown = prompts.opsd_student_prompt(question)
    else:
        shown = prompts.student_prompt(question)
    return Chat(shown, write_solution(rng, question, author))


def _informed(author: Author) -> Author:
    """Somebody who has a right solution before them: slips are rare, and are noticed."""
    return replace(author.careful(WITH_SOLUTION), notice=max(author.notice, NOTICE_WITH_SOLUTION))


def _noted(rng: random.Random, question: str, author: Author) -> tuple[str, Author]:
    """TRACE's private note: it names only a kind of step or of error, and makes its reader careful."""
    decisive = decisive_types(question)
    correct = bool(decisive) and rng.random() < 0.7
    types = rng.sample(decisive, rng.randint(1, len(decisive))) if correct else [rng.choice(list(ERRORS.values()))]
    shown = prompts.label_prompt(prompts.student_prompt(question), types, correct)
    return shown, author.careful(WITH_NOTE)


def _reprompted(rng: random.Random, question: str, author: Author) -> tuple[str, Author]:
    """SDPO's second attempt, with a solution, with feedback on the line where a first one went wrong, or with both."""
    shows_solution, shows_feedback = rng.choice(((True, False), (False, True), (False, True), (True, True)))
    solution = _correct_solution(rng, question) if shows_solution else None
    feedback = None
    if shows_feedback:
        steps = solve(question)[0]
        # Feedback is mostly about steps that tend to go wrong, and sometimes about any.
        chances = [sum(Author(0.0).weakness(step)) + 0.01 for step in steps]
        (wrong,) = rng.choices(range(len(steps)), chances)
        feedback = describe(steps, wrong, _mistaken(rng, steps[wrong]))
        author = replace(author.careful(WITH_FEEDBACK), told=steps[wrong].operation.label)
    shown = prompts.sdpo_prompt(prompts.student_prompt(question), solution, feedback)
    return shown, _informed(author) if shows_solution else author


def _mistaken(rng: random.Random, step) -> str:
    """A line that an ordinary author might have written in place of ``step``."""
    hasty = Author(0.0, eager=0.9, hesitant=0.9, forgetful=0.9, slip=0.5)
    stated = hasty.attempt(rng, step)
    while kind_of_mistake(step, stated.line) in ("total", "carry") and stated == step:
        stated = hasty.attempt(rng, step)
    return stated.line


def _correct_solution(rng: random.Random, question: str) -> str:
    """A reference solution, or a successful attempt with its filler, as SDPO shows it."""
    if rng.random() < 0.5:
        return concise_solution(question)
    return write_solution(rng, question, Author(VERBOSE).careful(0.0))
