# SPDX-License-Identifier: Apache-2.0
"""The dual-path math grader: what counts as correct, and that threads and hostile answers do not change
it."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd_ext.rewards import math_dual
from opd_ext.rewards.math_dual import answer_line, compute_score, last_box

KEYS = {"score", "acc", "acc_answer_only", "acc_boxed_only", "format_ok", "feedback"}

# gold, response, then the expected (acc, acc_answer_only, acc_boxed_only, format_ok)
CASES = {
    "answer line in math mode with a full stop": ("42", "So we get it.\nAnswer: $42$.", (1, 1, 0, 1)),
    "answer line, lower case, spaces": ("42", "answer :   42", (1, 1, 0, 1)),
    "answer on the line after the colon": ("42", "Answer:\n42", (1, 1, 0, 1)),
    "the last answer line counts": ("42", "Answer: 41\nWait.\nAnswer: 42", (1, 1, 0, 1)),
    "an earlier answer line does not": ("42", "Answer: 42\nWait.\nAnswer: 41", (0, 0, 0, 1)),
    "boxed only": ("42", "Hence \\boxed{42}.", (1, 0, 1, 1)),
    "boxed answer line": ("42", "Answer: \\boxed{42}", (1, 1, 1, 1)),
    "answer line right, box wrong": ("42", "\\boxed{41}\nAnswer: 42", (1, 1, 0, 1)),
    "neither, but the response as a whole says it": (
        "42",
        "Therefore the final answer is $42$.",
        (1, 0, 0, 0),
    ),
    "fraction": ("\\frac{1}{2}", "Answer: $\\frac{1}{2}$", (1, 1, 0, 1)),
    "fraction as decimal": ("\\frac{1}{2}", "Answer: 0.5", (1, 1, 0, 1)),
    "short fraction": ("\\frac14", "Answer: 1/4", (1, 1, 0, 1)),
    "tuple": ("\\left( 3, \\frac{\\pi}{2} \\right)", "Answer: $(3, \\pi/2)$", (1, 1, 0, 1)),
    "tuple in another order": ("(1, 2)", "Answer: $(2, 1)$", (0, 0, 0, 1)),
    "square root": ("5\\sqrt{2}", "Hence \\boxed{\\sqrt{50}}", (1, 0, 1, 1)),
    "text": ("\\text{Evelyn}", "Answer: Evelyn", (1, 1, 0, 1)),
    "other text": ("\\text{Evelyn}", "Answer: \\text{Angela}", (0, 0, 0, 1)),
    "thousands separator": ("10000", "Answer: 10,000", (1, 1, 0, 1)),
    "factorial keeps its mark": ("24", "Answer: $4!$.", (1, 1, 0, 1)),
    "without the mark it is another number": ("24", "Answer: $4$.", (0, 0, 0, 1)),
    "polynomial": ("x^2+2x+1", "Answer: $(x+1)^2$", (1, 1, 0, 1)),
    "wrong": ("42", "Answer: 41", (0, 0, 0, 1)),
    "only punctuation after the colon": ("42", "Answer: .", (0, 0, 0, 0)),
    "unclosed box": ("42", "so \\boxed{\\frac{4", (0, 0, 0, 0)),
    "empty response": ("42", "", (0, 0, 0, 0)),
    "no number anywhere": ("42", "I do not know!", (0, 0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_verdict(case):
    gold, response, expected = CASES[case]
    result = compute_score("math", response, gold)
    assert (
        result["acc"],
        result["acc_answer_only"],
        result["acc_boxed_only"],
        result["format_ok"],
    ) == expected
    assert result["score"] == result["acc"] and set(result) == KEYS


def test_feedback_is_silent_on_success_asks_for_the_format_and_never_tells_the_answer():
    assert compute_score("math", "Answer: 1234567", "1234567")["feedback"] == ""
    assert compute_score("math", "Answer: 1", "1234567")["feedback"] == ""
    silent = compute_score("math", "no idea", "1234567")["feedback"]
    assert "Answer:" in silent and "1234567" not in silent


def test_threads_grade_as_the_main_thread_does():
    here = [compute_score("math", response, gold) for gold, response, _ in CASES.values()]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(compute_score, "math", response, gold) for gold, response, _ in CASES.values()]
    there = [job.result() for job in jobs]
    assert there == here and any(result["acc"] for result in there)


def test_an_answer_that_never_evaluates_costs_its_deadline_and_nothing_else(monkeypatch):
    monkeypatch.setattr(math_dual, "DEADLINE_SECONDS", 1.0)  # below math-verify's own 5 s, so the child is killed
    started = time.monotonic()
    result = compute_score("math", "Answer: $10^{10^{10}}$", "42")
    assert time.monotonic() - started < 4
    assert result["acc"] == 0 and "in time" in result["feedback"]
    monkeypatch.undo()
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1


def test_a_killed_grading_process_is_replaced():
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1
    math_dual._grader._child.kill()
    math_dual._grader._child.wait()
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1


def test_a_forked_process_grades_for_itself():
    def grade(results):
        results.put([compute_score("math", response, "42")["acc"] for response in ("Answer: 42", "Answer: 41")])

    compute_score("math", "Answer: 42", "42")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=grade, args=(results,))
    child.start()
    assert results.get() == [1, 0]
    child.join()
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1


def test_a_response_of_any_length_is_graded_by_its_end():
    filler = "The value of $3$ is not it, so we go on.\n" * 10_000
    assert compute_score("math", filler + "Answer: 42", "42")["acc_answer_only"] == 1
    assert compute_score("math", "Answer: 42\n" + filler, "42")["acc_answer_only"] == 0


@pytest.mark.parametrize("gold", [None, "", "  "])
def test_an_empty_reference_is_a_fault_of_the_data(gold):
    with pytest.raises(ValueError, match="'dapo' has a sample with an empty ground_truth"):
        compute_score("dapo", "Answer: 42", gold)


def test_numeric_references_are_accepted():
    assert compute_score("math", "Answer: 42", 42)["acc"] == 1


def test_answer_cleaning_keeps_the_exclamation_mark_only():
    assert answer_line("Answer: 4! . , ; : ? \" ' ") == "4!"
    assert answer_line("no such line") == ""


def test_boxes_nest():
    assert last_box("\\boxed{1} then \\boxed{\\frac{1}{\\sqrt{2}}} end") == "\\frac{1}{\\sqrt{2}}"
