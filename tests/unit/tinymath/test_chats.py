# SPDX-License-Identifier: Apache-2.0
"""The corpus: an instruction changes how much filler there is, never which lines can be written."""

import random
from collections import Counter

import pytest

from opd_ext.context import prompts
from opd_ext.tinymath.chats import BUDGETS, chats, draw_chat, filler_probability, textbook
from opd_ext.tinymath.grader import compute_score
from opd_ext.tinymath.problems import DIFFICULTIES, draw_question, solve
from opd_ext.tinymath.writing import VERBOSE

DRAWS = 6000
INSTRUCTIONS = [*prompts.INSTRUCTIONS, *(f"{kind}-{amount}" for kind in BUDGETS for amount in BUDGETS[kind])]


@pytest.fixture(scope="module")
def drawn():
    """``(difficulty, question, chat)`` from the corpus of the finished model's habits."""
    rng, corpus = random.Random(0), chats()
    asked = [(d, draw_question(rng, d)) for _ in range(DRAWS // len(DIFFICULTIES)) for d in DIFFICULTIES]
    return [(d, question, draw_chat(rng, question, d, corpus)) for d, question in asked]


def replies(drawn, opening):
    return [(question, chat.response) for _, question, chat in drawn if chat.prompt.startswith(opening)]


def lines_per_step(pairs):
    return sum(len(reply.split("\n")) for _, reply in pairs) / sum(len(solve(question)[0]) + 1 for question, _ in pairs)


def openings(pairs):
    """How often a reply begins with filler, and how often with the first column."""
    return Counter(reply.split(": ")[0] == solve(question)[0][0].label for question, reply in pairs)


@pytest.mark.parametrize("text_id", INSTRUCTIONS)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_under_every_instruction_filler_is_possible_and_no_likelier_than_without(text_id, difficulty):
    assert 0 < filler_probability(text_id, difficulty) <= VERBOSE


def test_the_concise_prompt_is_answered_in_fewer_lines_by_the_same_grammar(drawn):
    plain = replies(drawn, prompts.STUDENT_HEADER)
    concise = replies(drawn, prompts.INSTRUCTIONS["v2"])
    assert len(plain) > 2000 and len(concise) > 200
    assert lines_per_step(concise) < 0.7 * lines_per_step(plain)
    # Support is shared: at its first line, either prompt is answered with filler and without.
    for pairs in (plain, concise):
        assert min(openings(pairs).values()) > 0.02 * len(pairs) and len(openings(pairs)) == 2


def test_what_the_prompt_tells_is_used(drawn):
    """Who reads a solution or a private note does not slip, who reads feedback slips less than who reads nothing."""

    def accuracy(pairs):
        scores = [compute_score("tinymath", reply, str(solve(question)[1]))["score"] for question, reply in pairs]
        return sum(scores) / len(scores)

    def shown(opening):
        return [(q, chat.response) for _, q, chat in drawn if opening in chat.prompt]

    plain = accuracy([(q, chat.response) for _, q, chat in drawn if chat.prompt == prompts.student_prompt(q)])
    assert plain < 0.9
    assert accuracy(shown(prompts.OPSD_SOLUTION_OPENING)) == accuracy(shown(prompts.SDPO_SOLUTION_OPENING)) == 1
    assert accuracy(shown(prompts.LABEL_STEP_OPENING)) == accuracy(shown(prompts.LABEL_ERROR_OPENING)) == 1
    assert plain < accuracy(shown(prompts.SDPO_FEEDBACK_OPENING)) < 1


def test_textbook_chats_are_right():
    rng, corpus = random.Random(1), textbook()
    for index in range(300):
        difficulty = DIFFICULTIES[index % 5]
        question = draw_question(rng, difficulty)
        reply = draw_chat(rng, question, difficulty, corpus).response
        assert compute_score("tinymath", reply, str(solve(question)[1]))["score"] == 1.0
