# SPDX-License-Identifier: Apache-2.0
"""The grader: the last answer line counts, feedback points at a step and keeps the answer back."""

import random
import re

import pytest

from opd_ext.tinymath.grader import FEEDBACK, compute_score
from opd_ext.tinymath.problems import DIFFICULTIES, concise_solution, draw_question, solve
from opd_ext.tinymath.writing import VERBOSE, Author, write_solution

QUESTION = "What is 487+356?"


def grade(response, question=QUESTION, answer="843"):
    return compute_score("tinymath", response, answer, {"question": question})


def test_the_reference_solution_is_right_and_gets_no_feedback():
    expected = {"score": 1.0, "acc": 1.0, "feedback": "", "format_ok": 1.0}
    assert grade(concise_solution(QUESTION)) == expected
    assert compute_score("tinymath", "Answer: 843", "843") == expected


def test_a_solution_without_slips_is_right_however_wordy():
    rng = random.Random(2)
    for index in range(500):
        question = draw_question(rng, DIFFICULTIES[index % 5])
        for filler in (0.0, VERBOSE, 1.0):
            written = write_solution(rng, question, Author(filler).careful(0.0))
            assert grade(written, question, str(solve(question)[1]))["score"] == 1.0


def test_the_last_answer_line_counts():
    assert grade("Answer: 1\nAnswer: 843")["score"] == 1.0
    assert grade("Answer: 843\nno, Answer: 1")["score"] == 0.0


@pytest.mark.parametrize("line", ["answer : 843.", "ANSWER:843", "Answer: 0843", "Answer: +843 "])
def test_harmless_variants_of_the_answer_line_are_accepted(line):
    assert grade(line)["score"] == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "\x00",
        "843",
        "Answer:",
        "Answer: 843 or 844",
        "Answer: 842+1",
        "Answer: " + "9" * 100_000,
        "ones: " + "7+" * 50_000,
        "ones: 7+6=" + "1" * 100_000,
        "Answer: __import__('os')",
        "Answer: ８４３ or so",
        "tens: 1=1\n" * 2_000,
    ],
)
def test_a_useless_or_malicious_response_is_wrong_and_nothing_else(response):
    result = grade(response)
    assert set(result) == {"score", "acc", "feedback", "format_ok"}
    assert result["score"] == result["acc"] == 0.0
    assert result["feedback"] and len(result["feedback"]) < 100


def test_missing_text_is_graded_as_an_empty_response():
    assert grade(None) == grade("")


def test_feedback_names_the_first_wrong_step_and_what_belongs_there():
    wrong = "ones: 7+6=13\ntens: 8+5+1=15\nhundreds: 4+3+1=8\nAnswer: 853"
    assert grade(wrong)["feedback"] == "One step is wrong. It should be tens: 8+5+1=14"


def test_a_skipped_step_is_the_wrong_one():
    wrong = "ones: 7+6=13\nhundreds: 4+3=7\nAnswer: 73"
    assert grade(wrong)["feedback"] == "One step is wrong. It should be tens: 8+5+1=14"


def test_a_repeated_column_replaces_its_first_version():
    spoiled = "ones: 7+6=13\nWait, let me check again.\nones: 7+6=14\ntens: 8+5+1=14\nAnswer: 844"
    assert grade(spoiled)["feedback"] == "One step is wrong. It should be ones: 7+6=13"
    slip_elsewhere = "ones: 7+6=12\nWait, let me check again.\nones: 7+6=13\ntens: 8+5+1=13\nAnswer: 1"
    assert grade(slip_elsewhere)["feedback"] == "One step is wrong. It should be tens: 8+5+1=14"


def test_right_steps_with_a_wrong_or_missing_answer_line_are_told_apart():
    steps = concise_solution(QUESTION).rsplit("\n", 1)[0]
    assert grade(f"{steps}\nAnswer: 834")["feedback"] == FEEDBACK["answer_line"]
    assert grade(steps)["feedback"] == FEEDBACK["no_answer"]
    truncated = steps.split("\n")[0]
    assert grade(truncated)["feedback"] == FEEDBACK["no_answer"], "it stops early and slips nowhere"


def test_without_the_question_feedback_is_general():
    assert compute_score("tinymath", "Answer: 1", "843")["feedback"] == FEEDBACK["wrong"]
    assert compute_score("tinymath", "hm", "843", extra_info={})["feedback"] == FEEDBACK["no_answer"]


def test_feedback_never_states_the_final_answer_as_a_result():
    rng, seen = random.Random(0), 0
    for index in range(3000):
        question = draw_question(rng, DIFFICULTIES[index % 5])
        answer = str(solve(question)[1])
        sloppy = Author(VERBOSE, slip=0.5, large_digits_slip=0.5, look_again_slip=0.0)
        result = grade(write_solution(rng, question, sloppy), question, answer)
        seen += result["score"] == 0.0
        assert (result["feedback"] == "") == (result["score"] == 1.0)
        assert not re.search(rf"={answer}\b", result["feedback"])
    assert seen > 1000


def test_feedback_agrees_with_the_slip_that_an_author_made():
    """Wherever the answer is wrong the feedback is the first line that departs from the reference."""
    rng = random.Random(1)
    for index in range(500):
        question = draw_question(rng, DIFFICULTIES[index % 5])
        written = write_solution(rng, question, Author(0.0, slip=0.3, large_digits_slip=0.3))
        pairs = zip(written.split("\n"), concise_solution(question).split("\n"), strict=False)
        first = next((right for stated, right in pairs if stated != right), None)
        result = grade(written, question, str(solve(question)[1]))
        if result["score"] == 0.0:
            assert first.split("=")[0] in result["feedback"]
