# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the last answer element decides, exactly, and nothing is given away."""

import pytest

from opd_ext.rewards.mcq import SYSTEM_PROMPT, compute_score, stated_answer, user_prompt


def graded(response, letter="B"):
    result = compute_score("sciknoweval", response, letter, extra_info={"split": "train"}, truncated=False)
    assert list(result) == ["score", "acc", "feedback", "format_ok"] and result["score"] == result["acc"]
    assert all(isinstance(value, float) for name, value in result.items() if name != "feedback")
    assert result["feedback"] == ""
    return result["score"], result["format_ok"]


@pytest.mark.parametrize(
    "response, score, format_ok",
    [
        ("<reasoning>\nB fits.\n</reasoning>\n<answer>\nB\n</answer>", 1.0, 1.0),
        ("<answer>B</answer>", 1.0, 1.0),
        ("<answer> \t B \n</answer> and more", 1.0, 1.0),
        ("<answer>A</answer> no: <answer>B</answer>", 1.0, 1.0),
        ("<answer>B</answer> no: <answer>A</answer>", 0.0, 1.0),
        ("<answer>A</answer>", 0.0, 1.0),
        ("<answer>b</answer>", 0.0, 0.0),
        ("<answer>B.</answer>", 0.0, 0.0),
        ("<answer>B: the second</answer>", 0.0, 0.0),
        ("<answer></answer>", 0.0, 0.0),
        ("<answer>A or B</answer>", 0.0, 0.0),
        ("<answer>B", 0.0, 0.0),
        ("<answer>B</answer> <answer>A", 0.0, 0.0),
        ("</answer>B<answer>", 0.0, 0.0),
        ("The answer is B", 0.0, 0.0),
        ("B", 0.0, 0.0),
        ("", 0.0, 0.0),
        (None, 0.0, 0.0),
    ],
)
def test_only_the_exact_letter_in_the_last_answer_element_scores(response, score, format_ok):
    assert graded(response) == (score, format_ok)


def test_the_element_reads_up_to_the_first_closing_tag():
    assert stated_answer("<answer>A</answer></answer>") == "A"
    assert stated_answer("no element") is None


def test_white_space_around_the_reference_is_no_part_of_it():
    assert graded("<answer>B</answer>", " B\n") == (1.0, 1.0)


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_sample_without_reference_is_a_fault_of_the_data(missing):
    with pytest.raises(ValueError, match="'sciknoweval' has a sample with an empty ground_truth"):
        graded("<answer>B</answer>", missing)


def test_a_long_response_is_graded_at_once():
    assert graded("<answer>" * 200_000 + "B</answer>") == (1.0, 1.0)


def test_the_prompts_are_the_published_ones():
    assert SYSTEM_PROMPT == (
        "Given a question and four options, please select the right answer. Respond in the following format:\n"
        "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"
        "For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing "
        'else. Do not restate the answer text. For example, if the answer is "A", just output:\n'
        "<answer>\nA\n</answer>"
    )
    assert user_prompt("Which {gas}?", ["O2", "{N2}", "He", "Ne"]) == (
        "Which {gas}?\n\nA: O2\nB: {N2}\nC: He\nD: Ne\nPlease reason step by step."
    )


@pytest.mark.parametrize("count", [0, 27])
def test_a_question_has_as_many_options_as_there_are_letters(count):
    with pytest.raises(ValueError, match=f"a question has {count} options"):
        user_prompt("Q", ["x"] * count)
