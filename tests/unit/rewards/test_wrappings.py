# SPDX-License-Identifier: Apache-2.0
"""Right and wrong answers in the ways in which responses state them: what the maths grader must not miss or pay."""

import pytest

from opd_ext.rewards.math_dual import compute_score

# A reference, what is equal to it, and what is not: kinds of answers of MATH, AIME and DAPO's set.
TRUTHS = [
    ("42", ["42", "42.0", "+42"], ["43", "-42", "4.2", "420", "42^2"]),
    ("-3", ["-3", "−3", "-3.0"], ["3", "-33"]),
    ("1000", ["1000", "1,000", "1{,}000", r"1\,000", "10^3"], ["100", "1,00", "1001"]),
    (r"\frac{1}{2}", [r"\frac{1}{2}", r"\dfrac12", "1/2", "0.5"], ["2", "0.05", r"\frac{2}{1}"]),
    (r"-\frac{7}{3}", [r"-\frac{7}{3}", "-7/3", r"\frac{-7}{3}"], ["7/3", r"-\frac{3}{7}"]),
    ("0.25", ["0.25", "1/4", r"\frac14", ".25"], ["0.2", "25"]),
    (r"50\%", [r"50\%", "50%", "0.5"], [r"5\%", "0.05"]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", r"2\sqrt3", "2√3"], [r"3\sqrt{2}", r"\sqrt{3}"]),
    (r"\pi", [r"\pi", "π"], [r"2\pi", "3"]),
    (r"90^\circ", [r"90^\circ", "90", "90°", "90 degrees"], [r"9^\circ", "180"]),
    ("x^2+2x+1", ["x^2+2x+1", "(x+1)^2", "1+2x+x^2"], ["x^2+2x-1", "(x+2)^2"]),
    ("(1, 2)", ["(1, 2)", "(1,2)", r"\left(1, 2\right)"], ["(2, 1)", "(1, 3)"]),
    ("[2, 5)", ["[2, 5)", r"\left[2,5\right)"], ["(2, 5)", "[2, 6)"]),
    (r"\{1, 3\}", [r"\{1, 3\}", r"\{3, 1\}"], [r"\{1, 2\}", r"\{1\}"]),
    ("2^{10}", ["2^{10}", "1024"], ["2^{11}", "1023"]),
    ("5!", ["120", "5!"], ["5", "60"]),
    (r"\text{even}", [r"\text{even}", "even"], ["odd"]),
    ("C", ["C", "(C)", r"\text{C}"], ["D", "A"]),
    ("17.5", ["17.5", "35/2", r"17\frac{1}{2}"], ["17", "175"]),
    ("10^{-4}", ["10^{-4}", "0.0001"], ["10^{4}", "0.001"]),
]  # fmt: skip
WRAPPINGS = [
    "Answer: {}", "Answer: ${}$", "Answer: $${}$$", r"Answer: \({}\)", r"Answer: \[{}\]", "Answer: {}.",
    "Answer: ${}$.", "**Answer:** {}", "**Answer**: ${}$", "**Answer: {}**", "Final Answer: {}", "### Answer: ${}$",
    "answer: {}",
    "Answer： {}", "Answer:\n{}", "We add.\n\nAnswer: {}\n", "<think>Is it 7?</think>\nAnswer: {}",
    r"Answer: \boxed{{{}}}", r"Answer: $\boxed{{{}}}$", r"So it is $\boxed{{{}}}$.", r"\boxed{{{}}}",
    r"\[\boxed{{{}}}\]", r"Thus $\boxed{{ {} }}$, as asked.", r"The answer is \boxed{{{}}}.",
]  # fmt: skip
READ = ("acc_answer_only", "acc_boxed_only", "acc_strict")
"""Verdicts on what stands in a line or a box; `acc` also follows CRISP's rule, which reads the response as a whole."""


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_right_answer_earns_in_every_wrapping_and_a_wrong_one_in_none(wrapping):
    missed, paid = [], []
    for reference, right, wrong in TRUTHS:
        for text in right:
            found = compute_score("", wrapping.format(text), reference)
            missed += [(reference, text, name) for name in ("acc", "acc_strict") if not found[name]]
        for text in wrong:
            found = compute_score("", wrapping.format(text), reference)
            paid += [(reference, text, name) for name in READ if found[name]]
    assert (missed, paid) == ([], [])
