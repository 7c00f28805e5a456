# SPDX-License-Identifier: Apache-2.0
"""The questions, their working and how authors write it down."""

import random

import pytest

from opd_ext.tinymath.problems import (
    DIFFICULTIES,
    concise_solution,
    distinct_questions,
    draw_question,
    expression,
    solve,
)
from opd_ext.tinymath.writing import LOOK_AGAIN, MAX_FILLERS, Author, write_solution


@pytest.fixture
def rng():
    return random.Random(0)


def questions(rng, each=200):
    return [(d, draw_question(rng, d)) for d in DIFFICULTIES for _ in range(each)]


def test_column_working_arrives_at_the_value_of_the_expression(rng):
    for _, question in questions(rng):
        assert solve(question)[1] == eval(expression(question)), question


def test_the_answer_is_written_through_its_columns():
    assert concise_solution("What is 487+356?") == ("ones: 7+6=13\ntens: 8+5+1=14\nhundreds: 4+3+1=8\nAnswer: 843")
    assert concise_solution("What is 403-398?") == ("ones: 13-8=5\ntens: 10-1-9=0\nhundreds: 4-1-3=0\nAnswer: 5")
    assert concise_solution("What is 46*7+58?") == (
        "ones: 6*7=42\ntens: 4*7+4=32\nnow: 322+58\nones: 2+8=10\ntens: 2+5+1=8\nhundreds: 3+0=3\nAnswer: 380"
    )


def test_harder_problems_need_more_steps(rng):
    counts = {d: [] for d in DIFFICULTIES}
    for difficulty, question in questions(rng):
        counts[difficulty].append(len(solve(question)[0]))
    means = [sum(counts[d]) / len(counts[d]) for d in DIFFICULTIES]
    assert means == sorted(means)
    assert means[0] <= 2 < 3 <= means[2] < 4 <= means[3] < 4.5 < means[4]


@pytest.mark.parametrize("text", ["", "What is it?", "12", "Compute everything."])
def test_a_text_without_an_expression_is_refused(text):
    with pytest.raises(ValueError, match="not a tinymath question"):
        solve(text)


def test_questions_are_drawn_once_and_in_balance(rng):
    drawn = distinct_questions(rng, taken={"What is 1+1?"})
    pairs = [next(drawn) for _ in range(1000)]
    assert len({question for _, question in pairs}) == 1000
    assert all(sum(d == difficulty for d, _ in pairs) == 200 for difficulty in DIFFICULTIES)


def test_a_careful_author_without_filler_writes_the_reference_solution(rng):
    for _, question in questions(rng, each=20):
        assert write_solution(rng, question, Author(0.0).careful(0.0)) == concise_solution(question)


def test_filler_changes_the_length_and_not_the_grammar(rng):
    for _, question in questions(rng, each=20):
        written = write_solution(rng, question, Author(1.0).careful(0.0)).split("\n")
        wanted = concise_solution(question).split("\n")
        assert len(written) >= len(wanted) + MAX_FILLERS
        position = 0
        for line in written:
            position += position < len(wanted) and line == wanted[position]
        assert position == len(wanted), "all reference lines stand in the text, in order"


def test_a_slip_is_carried_through_to_the_answer(rng):
    for _, question in questions(rng, each=20):
        written = write_solution(rng, question, Author(0.0, slip=1.0, large_digits_slip=1.0)).split("\n")
        assert written[0] != concise_solution(question).split("\n")[0]
        assert written[-1].startswith("Answer: ")


def test_looking_again_replaces_what_was_stated(rng):
    """A second attempt that always slips spoils the first one that never does."""
    author = Author(0.7, slip=0.0, large_digits_slip=0.0, look_again_slip=1.0)
    spoiled = 0
    for _ in range(200):
        lines = write_solution(rng, "What is 7+6?", author).split("\n")
        looked = LOOK_AGAIN in lines
        assert (lines[-1] == "Answer: 13") != looked
        spoiled += looked
    assert 50 < spoiled < 150
