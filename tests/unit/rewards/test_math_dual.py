# SPDX-License-Identifier: Apache-2.0
"""The dual-path math grader: what counts as correct, and that threads and hostile answers do not change
it."""

import logging
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from opd_ext.rewards import verifier
from opd_ext.rewards.answers import readings, sides, stated_box
from opd_ext.rewards.math_dual import answer_line, check_reference, compute_score, last_box

KEYS = {"score", "acc", "acc_strict", "acc_answer_only", "acc_boxed_only", "format_ok", "feedback"}

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


@pytest.fixture
def fresh_verifier(monkeypatch):
    """Children of its own, which are gone after the test, so that no other test waits behind a slow answer."""
    mine = verifier.Verifier()
    monkeypatch.setattr("opd_ext.rewards.math_dual.verifier_of_this_process", lambda: mine)
    yield mine
    for child in mine._children:
        child.stop()


@pytest.fixture
def asked(monkeypatch, fresh_verifier):
    """What a fresh verifier's children were asked, and for how many seconds at most."""
    asked, ask = [], verifier._Child.ask

    def noted(self, request, seconds):
        asked.append((request[1], seconds))
        return ask(self, request, seconds)

    monkeypatch.setattr(verifier._Child, "ask", noted)
    return asked


def test_an_answer_that_never_evaluates_costs_its_deadline_once_and_nothing_else(monkeypatch, asked, caplog):
    monkeypatch.setattr(verifier, "DEADLINE", 0.5)  # below math-verify's own limit, so the child is ended
    monkeypatch.setattr(verifier, "LIMIT_SECONDS", 2)
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # frameworks in this process switch it off,
    monkeypatch.setattr(verifier.logger, "disabled", False)  # as a whole or by name
    monkeypatch.setattr(verifier.logger, "propagate", True)
    caplog.set_level(logging.WARNING, logger=verifier.logger.name)
    slow = ("$10^{10^{10}}$", 0.5 * 2)
    result = compute_score("math", "Answer: $10^{10^{10}}$", "42")
    assert asked == [slow]
    assert result["acc"] == 0 and "in time" in result["feedback"]
    assert compute_score("math", "Once more.\nAnswer: $10^{10^{10}}$", "42") == result
    assert asked == [slow], "a text that has had its time is remembered"
    assert len(caplog.records) == 1 and len(caplog.text) < 300
    monkeypatch.setattr(verifier, "DEADLINE", 30)  # what can be graded has its time on a busy machine
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1


def test_slow_answers_are_graded_beside_others_and_hold_up_no_other(monkeypatch):
    """Three answers, side by side, outlast all others, in eight threads: with one process everyone waited for them."""
    slow, asked, overtaken = {"slow 0", "slow 20", "slow 40"}, [], threading.Event()

    class Child:
        alive = True

        def ask(self, request, seconds):
            asked.append(request[1])
            if "slow" not in request[1]:
                return verifier.RIGHT
            if request[1] in slow:  # it ends when everything else has been graded
                assert overtaken.wait(60), "somebody waited for it"
            return None

    monkeypatch.setattr(verifier, "_Child", Child)
    monkeypatch.setattr(verifier, "PATIENCE_SECONDS", 0.02)
    mine = verifier.Verifier()
    texts = [f"slow {i}" if i % 20 == 0 else str(i) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = {text: pool.submit(mine.verdict, "42", text) for text in texts}
        wait([verdict for text, verdict in verdicts.items() if text not in slow])
        overtaken.set()
    assert [each.result() for each in verdicts.values()] == [
        None if i % 20 == 0 else verifier.RIGHT for i in range(200)
    ]
    assert len(mine._children) == len(slow) + 1 == verifier.CHILDREN
    assert mine.verdict("42", "slow 20") is None and sorted(asked) == sorted(texts), "it is remembered"


@pytest.mark.parametrize("box", ["10^{10^{10}}", "9^{9^9}", "2^{2^{2^{9}}}", "(123456789)!", "7^{99999999}"])
def test_a_right_line_does_not_wait_for_a_box_that_never_evaluates(box, asked):
    """CRISP's rule takes either path, so the line decides: nobody asks about such a box."""
    result = compute_score("math", f"\\boxed{{{box}}}\nAnswer: 42", "42")
    assert {text for text, _ in asked} == {"42"}
    assert (result["acc"], result["acc_strict"], result["acc_boxed_only"], result["feedback"]) == (1, 0, 0, "")


def test_a_box_that_evaluates_is_asked_about_beside_a_right_line(asked):
    result = compute_score("math", "\\boxed{2^{3^{2}}}\nAnswer: 512", "512")
    assert "2^{3^{2}}" in dict(asked) and (result["acc_strict"], result["acc_boxed_only"]) == (1, 1)


def test_what_the_parsers_print_stays_in_their_process(capfd, fresh_verifier):
    for answer in ("$\\frac{" * 50, "$" + "(" * 500 + "$", "\\boxed{\\unknown{\\macro}}"):
        compute_score("math", f"Answer: {answer}", "42")
    assert capfd.readouterr() == ("", "")


def test_a_killed_grading_process_is_replaced(fresh_verifier):
    assert compute_score("math", "Answer: 42", "42")["acc"] == 1
    (child,) = fresh_verifier._children
    child.process.kill()
    child.process.wait()
    assert compute_score("math", "Answer: 42.0", "42")["acc"] == 1


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


@pytest.mark.parametrize(
    ("gold", "fault"),
    [
        (None, "is empty"),
        ("  ", "is empty"),
        (float("nan"), "says that there is none"),
        ("None", "says that there is none"),
        ("N/A", "says that there is none"),
        ("We add them and get \\boxed{1}.", "is a solution"),
        ("We add the numbers " * 8, "is a text, not an answer"),
        ("\\frac{1}{2", "braces that do not match"),
        ("1}{2", "braces that do not match"),
    ],
)
def test_a_reference_that_is_none_is_a_fault_of_the_data(gold, fault):
    """Graded as an answer it would make every response wrong in silence."""
    with pytest.raises(ValueError, match=f"'dapo': the reference answer.*{fault}.*leave the row out"):
        compute_score("dapo", "Answer: 42", gold)


@pytest.mark.parametrize(
    "gold",
    ["\\left\\{1, 2\\right\\}", "\\{1,2\\}", "[2, 5)", "\\text{all real numbers but one}", "52_9", "\\text{None}"],
)
def test_odd_references_are_references(gold):
    assert check_reference(gold) == gold


@pytest.mark.parametrize("gold", ["#### 42", "**42**", "42.", " ## 42 ", "$42$."])
def test_what_stands_around_a_reference_is_taken_off(gold):
    """As files of GSM8K's form, or of models' answers, have it."""
    for response in ("Answer: 42", r"\boxed{42}"):
        assert compute_score("math", response, gold)["acc"] == 1
    assert compute_score("math", "Answer: 43", gold)["acc"] == 0


@pytest.mark.parametrize(
    "gold",
    [
        "$$",
        "?",
        "{}",
        r"\text{}",
        r"\sqrt",
        r"\frac{1}",
        r"\frac",
        "1 +",
        "x =",
        "The answer is 5",
        "<answer>3</answer>",
    ],
)
def test_a_reference_that_no_answer_can_equal_is_refused(gold):
    with pytest.raises(ValueError, match="the reference answer .* (is|holds) .*: give the bare answer in LaTeX"):
        check_reference(gold)


@pytest.mark.parametrize(
    "gold", [r"\{\}", r"\emptyset", "0^+", "A^*", r"\pm", "5!", r"\frac12", r"\sqrt3", "x < a", "0.5"]
)
def test_short_references_stay(gold):
    assert check_reference(gold) == gold


def test_numeric_references_are_accepted():
    assert compute_score("math", "Answer: 42", 42)["acc"] == 1


def test_answer_cleaning_keeps_the_exclamation_mark_only():
    assert answer_line("Answer: 4! . , ; : ? \" ' ") == "4!"
    assert answer_line("no such line") == ""


def test_boxes_nest():
    assert last_box("\\boxed{1} then \\boxed{\\frac{1}{\\sqrt{2}}} end") == "\\frac{1}{\\sqrt{2}}"


# ---------------------------------------------------------------------- spellings

SAME = [  # reference, answer; every one is graded in a line and in a box
    ("10", "10%"),
    ("10", "10\\%"),
    ("10\\%", "10"),
    ("10\\%", "$10\\%$"),
    ("12.5\\%", "12.5 percent"),
    ("0.1", "10\\%"),
    ("50\\%", "\\frac{1}{2}"),
    ("90^\\circ", "90°"),
    ("90", "90^{\\circ}"),
    ("90^\\circ", "90 degrees"),
    ("2220", "2\\,220"),
    ("2220", "2\u2009220"),
    ("1234567", "1\\,234\\,567"),
    ("-50", "–50"),
    ("-50", "−50"),
    ("\\sqrt{51}", "√51"),
    ("2\\sqrt{51}", "2√51"),
    ("\\sqrt{x+1}", "√(x+1)"),
    ("\\pi", "pi"),
    ("(2,\\infty)", "(2,∞)"),
    ("\\frac{1}{2^{98}}", "1/2^{98}"),
    ("\\frac{1}{2004!}", "\\frac{2}{2 \\cdot 2004!}"),
    ("\\frac{1}{3000}", "0.000333"),
    ("10080", "x = 10,\\!080"),
    ("\\dfrac{9}{7}", "9/7"),  # Math-Verify 70
    ("C", "C. because 9 is odd"),
    ("C", "(C) 5 apples"),
    ("C", "C. x = 42"),
    ("1,2", "$x=1, x=2$"),
    ("1,2", "$x = 1$ or $x = 2$"),
    ("1,2", "$x = 1 \\text{ or } x = 2$"),
    ("1,2", "$x = 1, x = 4/2 = 2$"),
    ("1234", "x = 1,234"),
]
DIFFERENT = [
    ("5\\%", "500\\%"),
    ("500", "5\\%"),
    ("90", "9°"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),  # Math-Verify 14, and three of its kind
    ("1/2^{98}", "1/2^{99}"),
    ("0.0000002", "0.0000001"),
    ("1/2^{98}", "0"),
    ("50", "–50"),
    ("\\{1331, 1728\\}", "1728"),  # Math-Verify 47
    ("\\{1,2,3\\}", "\\{1,2\\}"),
    ("3x-y+13=0", "3x+4y+14=0"),  # Math-Verify 60
    ("C", "B. because C is even"),
    ("C", "C. or D."),
    ("C", "B because C is even"),
    ("C", "B. x = 42"),
    ("1,2", "$x=1, x=3$"),
    ("1,2", "$x=1, x=17=2$"),
    ("2", "$x=1, x=2$"),
]


@pytest.mark.parametrize("form", ["Answer: {}", "Hence \\boxed{{{}}}.", "**Final answer: {}**"])
def test_one_number_spelled_in_two_ways_is_one_answer_and_two_are_two(form):
    def accepted(pairs):
        return [pair for pair in pairs if compute_score("math", form.format(pair[1]), pair[0])["acc_strict"]]

    assert accepted(SAME) == SAME
    assert accepted(DIFFERENT) == []


def test_a_percent_sign_on_one_side_may_be_a_unit_or_a_hundredth():
    assert readings("10\\%", "10%") == [("10", "10")]
    assert readings("10", "10%") == [("10", "10"), ("10", "\\frac{10}{100}")]
    assert sides("$x = 1 \\approx 1.0$") == ["x", "1", "1.0"] and sides("x \\leq 2") == ["x \\leq 2"]


# ---------------------------------------------------------------------- policies

# response to a problem whose answer is 42, then (dual, strict)
POLICIES = {
    "a line": ("So.\nAnswer: 42", (1, 1)),
    "a bold line": ("✅ Final Answer: **42**", (1, 1)),  # Math-Verify 76
    "a bold heading": ("**Answer:**\n\n$42$", (1, 1)),
    "a bold word before the colon": ("**Answer**: 42", (1, 1)),
    "two bold words": ("**Final Answer**: 42", (1, 1)),
    "a slanted word": ("*Answer*: 42", (1, 1)),
    "a bold word by underscores": ("__Answer__: 42", (1, 1)),
    "underscores around the line": ("__Answer: 42__", (1, 1)),
    "a code span": ("Answer: `42`", (1, 1)),
    "display below": ("Answer:\n$$\n42\n$$", (1, 1)),
    "a box": ("Hence \\boxed{42}.", (1, 1)),
    "a frame": ("Hence \\fbox{42}.", (1, 1)),
    "a box without braces": ("Hence $\\boxed 42$.", (1, 1)),
    "box and line agree": ("\\boxed{42}\nAnswer: 42.0", (1, 1)),
    "a box in the line": ("\\boxed{41}? No.\nAnswer: $\\boxed{42}$", (1, 1)),
    "after the thinking": ("<think>Answer: 41, or \\boxed{3}</think>\nAnswer: 42", (1, 1)),
    "the template opens the thinking": ("Answer: 41</think>\nAnswer: 42", (1, 1)),
    "a chain of equal sides": ("Answer: $x = 84/2 = 42$", (1, 1)),
    "a rounded side": ("Answer: $42 \\approx 42.1$", (1, 1)),
    "right box, wrong line": ("I think \\boxed{42}. Wait.\nAnswer: 41", (1, 0)),
    "right line, wrong box": ("\\boxed{41}\nAnswer: 42", (1, 0)),
    "an open last box": ("\\boxed{42}, more exactly \\boxed{4", (1, 0)),
    "only in the thinking": ("<think>Answer: 42</think> I do not know", (1, 0)),
    "thinking without an end": ("<think>Answer: 42", (1, 0)),
    "no stated answer": ("so $6h = 252$ and then $h=42$", (1, 0)),
    "two sides that differ": ("Answer: $17 = 42$", (1, 0)),
    "a side that is far off": ("Answer: $42 \\approx 1234567$", (1, 0)),
    "another answer in words behind": ("Answer: 42\nThe final answer is 17", (1, 0)),
    "another answer behind, as an equation": ("Answer: 42\nSo the answer is x = 17.", (1, 0)),
    "another answer behind a box": ("\\boxed{42}. Thus the correct answer is $17$.", (1, 0)),
    "taken back, with another": ("Answer: 42\nNo wait, actually it is 17.", (1, 0)),
    "taken back behind a box": ("\\boxed{42} No, that is wrong. I do not know.", (1, 0)),
    "doubted": ("Answer: 42\nI am not sure.", (1, 0)),
    "a mistake": ("$\\boxed{42}$.\n\nHmm, I made a mistake above.", (1, 0)),
    "taken back on the line": ("Answer: 42. No, that is wrong.", (1, 0)),
    "a friendly end": ("Answer: 42\nThis is the answer.", (1, 1)),
    "the same once more": ("Answer: 42\nThe final answer is $42$.", (1, 1)),
    "the same once more, bold": ("\\boxed{42}\n\n**The answer is 42.**", (1, 1)),
    "the same with words": ("\\boxed{42}\nSo the answer is 42 as required.", (1, 1)),
    "a unit behind a box": ("It is \\boxed{42} cm.", (1, 1)),
    "thanks": ("Answer: 42\nThank you, I hope this helps!", (1, 1)),
    "no other solution": ("Answer: 42\nNo other value works, and the answer is correct.", (1, 1)),
    "a form": ("\\boxed{42}. The answer is in simplest form.", (1, 1)),
    "a check": ("\\boxed{42}\nCheck: $6 \\cdot 7 = 42$, which is right.", (1, 1)),
    "a guess before": ("Answer: 42\nWait.\nAnswer: 41", (0, 0)),
    "two boxes, the right one first": ("\\boxed{42} or \\boxed{41}", (0, 0)),
    "nothing": ("", (0, 0)),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_reward_asks_for_one_final_answer_where_an_evaluation_reads_all(case):
    response, expected = POLICIES[case]
    dual, strict = (compute_score("math", response, "42", {"truncated": False}, policy=p) for p in ("dual", "strict"))
    assert (dual["score"], strict["score"]) == expected
    assert (dual["acc"], dual["acc_strict"]) == expected == (strict["acc"], strict["acc_strict"])
    assert (strict["feedback"] == "") or (strict["score"] == 0 and "42" not in strict["feedback"])


def test_a_response_that_was_cut_earns_nothing_under_the_strict_policy():
    cut = compute_score("math", "Answer: 42", "42", {"truncated": True}, policy="strict")
    assert (cut["score"], cut["acc"], cut["acc_strict"]) == (0, 1, 0)


def test_another_policy_is_refused():
    with pytest.raises(ValueError, match=r"reward_kwargs\.policy=lenient does not exist: choose dual or strict"):
        compute_score("math", "Answer: 42", "42", policy="lenient")


def test_a_last_box_that_stays_open_is_told_from_none():
    assert (stated_box("\\boxed{4"), stated_box("no box")) == (None, "")


HOSTILE = r"""
from opd_ext.rewards.answers import final_answers, never_evaluates
from opd_ext.rewards.math_dual import MAX_RESPONSE_CHARS as N
parts = ("\n", ". ", "1", ".$*", "no ", "answer is 1 ", "x,. ", "Answer: ", r"\boxed{", "$$")
for text in [part * N for part in parts] + ["answer is" + part * N for part in (" ", "* ", ": ", "1x,. ")]:
    final_answers("Answer: 42\n" + text[:N] + "x")
for text in ("1" * N, "111111" + "}" * N, "1^" * N, "1" + " " * N):
    never_evaluates(text)
"""


def test_no_text_keeps_the_grader_from_its_work():
    """Blanks behind `answer is` once took over five minutes, at a fifth of this length: repetitions met there."""
    subprocess.run([sys.executable, "-c", HOSTILE], check=True, timeout=120)
