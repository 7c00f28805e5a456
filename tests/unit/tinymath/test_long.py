# SPDX-License-Identifier: Apache-2.0
"""The second level: questions, authors, grader and diagnosis agree on what is right, and on which line is not."""

import random
import re

import pytest

from opd_ext.context import prompts
from opd_ext.tinymath.levels import LONG
from opd_ext.tinymath.long.chats import chats, textbook
from opd_ext.tinymath.long.diagnosis import diagnose
from opd_ext.tinymath.long.grader import compute_score
from opd_ext.tinymath.long.problems import concise_solution, draw_question, solve
from opd_ext.tinymath.long.properties import Mistake, mistakes
from opd_ext.tinymath.long.writing import LOOK_AGAIN, VERBOSE, Author, write_solution

QUESTION = "Start with 95.\na: +8\nb: if >05 then -7 else +6\nc: -2\nd: +9"
RIGHT = "a: 95+8=03\nb: 03>05 no, 03+6=09\nc: 09-2=07\nd: 07+9=16\nAnswer: 16"


def grade(response, question=QUESTION):
    return compute_score("tinymath_long", response, str(solve(question)[1]), {"question": question})


def test_the_counter_wraps_round_and_branches():
    assert concise_solution(QUESTION) == RIGHT
    assert solve(QUESTION)[1] == 16
    with pytest.raises(ValueError, match="not a question of tinymath's second level: 'What is 1"):
        solve("What is 1+2?")


@pytest.mark.parametrize(
    ("changes", "feedback"),
    [
        ((("03>05 no, 03+6=09", "03>05 yes, 03-7=96"), ("Answer: 16", "Answer: 03")),
         "The first wrong line takes the wrong branch. It should be b: 03>05 no, 03+6=09"),
        ((("95+8=03", "95+8=93"), ("Answer: 16", "Answer: 00")),
         "The first wrong line forgets to carry. It should be a: 95+8=03"),
        ((("09-2=07", "09-2=08"), ("Answer: 16", "Answer: 17")),
         "The first wrong line has a wrong total. It should be c: 09-2=07"),
        ((("c: 09-2", "c: 09+2"), ("Answer: 16", "Answer: 20")),
         "The first wrong line is not about this step. It should be c: 09-2=07"),
        ((("07+9=16", "07+9=15"), ("Answer: 16", "Answer: 15")), "The last line is wrong. Look again at d: 07+9"),
        ((("Answer: 16", "Answer: 61"),), "All lines are right but the answer does not follow from them."),
        ((("\nAnswer: 16", ""),), "The answer line is missing."),
    ],
)  # fmt: skip
def test_feedback_names_the_first_wrong_line_and_keeps_the_answer_back(changes, feedback):
    response = RIGHT
    for old, new in changes:
        assert old in response
        response = response.replace(old, new)
    found = grade(response)
    assert (found["score"], found["feedback"]) == (0.0, feedback)


def test_a_second_look_takes_the_place_of_the_line_before():
    slipped = RIGHT.replace("b: 03>05 no", f"b: 03>05 yes, 03-7=96\n{LOOK_AGAIN}\nb: 03>05 no")
    assert grade(slipped) == {"score": 1.0, "acc": 1.0, "feedback": "", "format_ok": 1.0}
    assert grade(slipped.replace("Answer: 16", "Answer: 1"))["feedback"].startswith("All lines are right")
    assert mistakes(QUESTION, slipped.split("\n")) == [Mistake(1, repaired=True)]


def test_what_follows_from_a_mistake_is_no_mistake_of_its_own():
    response = "a: 95+8=93\nb: 93>05 yes, 93-7=86\nHmm, right so far.\nc: 86-2=84\nd: 84+9=95\nAnswer: 95"
    assert mistakes(QUESTION, response.split("\n")) == [Mistake(0, False), Mistake(4, False)]
    (found,) = diagnose(QUESTION, response, correct=False)
    assert (response[found.start : found.end], found.type) == ("a: 95+8=93\n", "arithmetic_slip")


def test_authors_grader_and_diagnosis_agree():
    """The grader's first wrong line is the author's first slip, found here by counting and there by comparing."""
    rng = random.Random(0)
    right = {name: 0 for name in ("ordinary", "careful", "sure")}
    for index in range(400):
        difficulty, question = chats().question(rng, index)
        for name, author in (
            ("ordinary", Author(VERBOSE)),
            ("careful", Author(VERBOSE, notice=0.8).careful(0.25)),
            ("sure", Author(VERBOSE).careful(0.0)),
        ):
            response = write_solution(rng, question, author)
            found, lines = grade(response, question), response.split("\n")
            lasting = [slip for slip in mistakes(question, lines) if not slip.repaired]
            right[name] += int(found["acc"])
            assert not (lasting == [] and not found["acc"])
            if not found["acc"]:
                (finding,) = diagnose(question, response, correct=False)
                assert response[finding.start : finding.end].rstrip("\n") == lines[lasting[0].line]
    assert right["sure"] == 400
    assert 120 < right["ordinary"] < 220 and right["careful"] > 350, (
        "0.42 and 0.94 of 400, over four standard errors off"
    )


def test_no_feedback_and_no_note_gives_the_answer_away():
    rng = random.Random(1)
    for index in range(200):
        difficulty, question = chats().question(rng, index)
        response = write_solution(rng, question, Author(0.0))
        if feedback := grade(response, question)["feedback"]:
            assert "Answer" not in feedback
            last = solve(question)[0][-1]
            assert last.line not in feedback


def test_short_chains_are_for_textbooks_and_the_corpus_round_trips():
    tokenizer, rng = LONG.make_tokenizer(), random.Random(2)
    for index in range(60):
        for corpus, steps in ((textbook(), range(2, 10)), (chats(), range(12, 21))):
            difficulty, question = corpus.question(rng, index)
            assert len(re.findall(r"\n[a-z]: ", question)) in steps
            chat = corpus.chat(rng, question, difficulty)
            text = chat.prompt + chat.response
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = draw_question(rng, 4)
    assert len(tokenizer(prompts.student_prompt(question)).input_ids) < 256
