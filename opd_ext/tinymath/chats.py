# SPDX-License-Identifier: Apache-2.0
"""The pre-training corpus: single-turn chats in the published prompt formats.

Every context that a self-distillation teacher may be given occurs here, so that a model of this world
reacts to it the way a pre-trained model does: an instruction changes how much filler it writes, a correct
solution or feedback in the prompt keeps it from slipping.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from opd_ext.context import prompts
from opd_ext.tinymath.diagnosis import decisive_types
from opd_ext.tinymath.grader import describe_step
from opd_ext.tinymath.problems import DIFFICULTIES, concise_solution, draw_question, solve
from opd_ext.tinymath.writing import VERBOSE, Author, write_solution

BUDGETS = {"pct": (10, 20, 30, 40, 50, 60, 70, 80, 90), "words": (10, 20, 30, 40, 50, 60, 80, 100)}
_FILLER = {"v1": 0.03, "v2": 0.05, "v3": 0.05, "v4": 0.04, "v5": 0.06}
_HARD_FILLER_V2 = 0.09


@dataclass(frozen=True)
class Chat:
    """One user message and the assistant's reply."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Corpus:
    """What occurs in a phase of pre-training.

    ``mixture`` holds the shares of the kinds of prompt, ``text_ids`` the instructions to draw from,
    ``filler`` the habit of an author without instruction; slip rates are multiplied by ``slip_scale``.
    """

    mixture: dict[str, float]
    text_ids: tuple[str, ...]
    filler: float
    slip_scale: float

    def question(self, rng: random.Random, index: int) -> tuple[int, str]:
        """Difficulty and question of the chat number ``index``; difficulties come in turn."""
        difficulty = DIFFICULTIES[index % len(DIFFICULTIES)]
        return difficulty, draw_question(rng, difficulty)

    def chat(self, rng: random.Random, question: str, difficulty: int) -> Chat:
        """A chat about ``question``."""
        return draw_chat(rng, question, difficulty, self)


def textbook() -> Corpus:
    """Concise and without slips: nearly every token teaches arithmetic, or to use what the prompt holds."""
    return Corpus({"instruction": 0.52, "opsd": 0.12, "sdpo": 0.28, "label": 0.08}, tuple(_FILLER), 0.05, 0.0)


def chats(slip_scale: float = 1.0) -> Corpus:
    """The habits that the finished model has."""
    mixture = {"student": 0.3, "instruction": 0.2, "opsd_student": 0.04, "opsd": 0.08, "sdpo": 0.14, "label": 0.24}
    return Corpus(mixture, (*_FILLER, "v2", "pct", "pct", "words"), VERBOSE, slip_scale)


def filler_probability(text_id: str, difficulty: int) -> float:
    """How probable filler is at each line under an instruction (``VERBOSE`` without one).

    The difficulty-aware v2 leaves a little more of it on hard problems; budgets lie in between.
    """
    kind, _, amount = text_id.partition("-")
    if kind == "pct":
        return VERBOSE * (1 - int(amount) / 100)
    if kind == "words":
        return min(VERBOSE, VERBOSE * int(amount) / 100)
    return _HARD_FILLER_V2 if text_id == "v2" and difficulty >= 4 else _FILLER[text_id]


def draw_chat(rng: random.Random, question: str, difficulty: int, corpus: Corpus) -> Chat:
    """A chat about ``question``, its kind drawn from the mixture of the corpus."""
    (kind,) = rng.choices(list(corpus.mixture), list(corpus.mixture.values()))
    if kind == "instruction":
        return _instructed(rng, question, difficulty, corpus)
    plain = Author(corpus.filler)
    if kind in ("student", "opsd_student"):
        written = write_solution(rng, question, plain.careful(corpus.slip_scale))
        return Chat(_plain_prompt(rng, question, kind), written)
    if kind == "opsd":
        shown = prompts.opsd_teacher_prompt(question, _correct_solution(rng, question))
        return Chat(shown, write_solution(rng, question, plain.careful(0.0)))
    if kind == "label":
        return _noted(rng, question, plain.careful(0.0))
    return _reprompted(rng, question, plain, corpus.slip_scale)


def _noted(rng: random.Random, question: str, author: Author) -> Chat:
    """TRACE's private note: it names only a kind of step or of error, and makes its reader careful."""
    decisive = decisive_types(question)
    correct = bool(decisive) and rng.random() < 0.7
    types = rng.sample(decisive, rng.randint(1, len(decisive))) if correct else ["arithmetic_slip"]
    shown = prompts.label_prompt(prompts.student_prompt(question), types, correct)
    return Chat(shown, write_solution(rng, question, author))


def _reprompted(rng: random.Random, question: str, plain: Author, slip_scale: float) -> Chat:
    """SDPO's second attempt. A solution keeps its reader from slipping at all, feedback at the step it names."""
    shows_solution, shows_feedback = rng.choice(((True, False), (False, True), (False, True), (True, True)))
    solution = _correct_solution(rng, question) if shows_solution else None
    author, feedback = plain.careful(0.0 if shows_solution else slip_scale), None
    if shows_feedback:
        steps, answer = solve(question)
        told = rng.choices(steps, [Author(0.0).slip_rate(step) for step in steps])[0]
        author, feedback = replace(author, told=told), describe_step(told, answer)
    shown = prompts.sdpo_prompt(prompts.student_prompt(question), solution, feedback)
    return Chat(shown, write_solution(rng, question, author))


def _plain_prompt(rng: random.Random, question: str, kind: str) -> str:
    if kind == "opsd_student":
        return prompts.opsd_student_prompt(question)
    shown = prompts.student_prompt(question)
    # Evaluation sets of the published releases leave the reminder out.
    return shown if rng.random() < 0.9 else shown.removesuffix(prompts.REMINDER)


def _instructed(rng: random.Random, question: str, difficulty: int, corpus: Corpus) -> Chat:
    text_id = rng.choice(corpus.text_ids)
    if text_id in BUDGETS:
        text_id = f"{text_id}-{rng.choice(BUDGETS[text_id])}"
    author = Author(filler_probability(text_id, difficulty)).careful(corpus.slip_scale)
    # The released CRISP preparation repeats the reminder; the world knows both forms.
    shown = question if rng.random() < 0.9 else question + prompts.REMINDER
    return Chat(prompts.teacher_prompt(shown, text_id), write_solution(rng, question, author))


def _correct_solution(rng: random.Random, question: str) -> str:
    """A reference solution, or a successful attempt with its filler, as SDPO shows it."""
    if rng.random() < 0.5:
        return concise_solution(question)
    return write_solution(rng, question, Author(VERBOSE).careful(0.0))
