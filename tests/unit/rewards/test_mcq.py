# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: the released verdict, the stricter one on demand, and nothing is given away."""

import pytest

from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.reward import check_reward
from opd_ext.rewards.mcq import SYSTEM_PROMPT, compute_score, stated_answer, user_prompt


def graded(response, letter="B", **kwargs):
    result = compute_score("sciknoweval", response, letter, extra_info={"split": "train"}, **kwargs)
    assert list(result) == ["score", "acc", "feedback", "format_ok"] and result["score"] == result["acc"]
    assert all(isinstance(value, float) for name, value in result.items() if name != "feedback")
    assert result["feedback"] == ""
    return result["score"], result["format_ok"]


# `score`: split("<answer>")[-1].split("</answer>")[0].strip() == letter, feedback/mcq.py of lasgroup/SDPO.
@pytest.mark.parametrize(
    "response, score, score_if_closed, format_ok",
    [
        ("<reasoning>\nB fits.\n</reasoning>\n<answer>\nB\n</answer>", 1.0, 1.0, 1.0),
        ("<answer>B</answer>", 1.0, 1.0, 1.0),
        ("<answer> \t B \n</answer> and more", 1.0, 1.0, 1.0),
        ("<answer>A</answer> no: <answer>B</answer>", 1.0, 1.0, 1.0),
        ("<answer>B</answer> no: <answer>A</answer>", 0.0, 0.0, 1.0),
        ("<answer>A</answer>", 0.0, 0.0, 1.0),
        ("<answer>E</answer>", 0.0, 0.0, 0.0),
        ("<answer>b</answer>", 0.0, 0.0, 0.0),
        ("<answer>B.</answer>", 0.0, 0.0, 0.0),
        ("<answer>B: the second</answer>", 0.0, 0.0, 0.0),
        ("<answer></answer>", 0.0, 0.0, 0.0),
        ("<answer>A or B</answer>", 0.0, 0.0, 0.0),
        ("<reasoning>x</reasoning>\n<answer>\nB", 1.0, 0.0, 0.0),
        ("B\n</answer>", 1.0, 0.0, 0.0),
        ("B", 1.0, 0.0, 0.0),
        ("<answer>B</answer> <answer>A", 0.0, 0.0, 0.0),
        ("<answer>A</answer> <answer>B", 1.0, 0.0, 0.0),
        ("</answer>B<answer>", 0.0, 0.0, 0.0),
        ("The answer is B", 0.0, 0.0, 0.0),
        ("", 0.0, 0.0, 0.0),
        (None, 0.0, 0.0, 0.0),
    ],
)
def test_a_verdict_is_the_released_one_or_on_demand_that_of_closed_elements(
    response, score, score_if_closed, format_ok
):
    assert graded(response) == (score, format_ok)
    assert graded(response, closed=True) == (score_if_closed, format_ok)


def test_the_element_reads_up_to_the_first_closing_tag():
    assert stated_answer("<answer>A</answer></answer>") == "A"
    assert stated_answer("no element", closed=True) is None


def test_white_space_around_the_reference_is_no_part_of_it():
    assert graded("<answer>B</answer>", " B\n") == (1.0, 1.0)


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_a_sample_without_reference_is_a_fault_of_the_data(missing):
    with pytest.raises(ValueError, match="'sciknoweval' has a sample with an empty ground_truth"):
        graded("<answer>B</answer>", missing)


@pytest.mark.parametrize("wrong", ["E", "b", "AB", "BC", '["B"]', ["B"], "1", "BCD"])
def test_a_reference_that_is_no_choice_is_a_fault_of_the_data_and_not_of_every_answer(wrong):
    with pytest.raises(ValueError, match=r"which is none of A, B, C, D: .*reward_kwargs\.choices") as refused:
        graded("<answer>B</answer>", wrong)
    assert "\n" not in str(refused.value)


def test_a_set_with_more_options_says_so():
    assert graded("<answer>E</answer>", "E", choices=5) == (1.0, 1.0)
    with pytest.raises(ValueError, match="none of A, B:"):
        graded("<answer>C</answer>", "C", choices=2)


def test_what_a_run_sets_reaches_the_grader():
    """verl hands ``reward_kwargs`` on as keywords, though its YAML does not list the key."""
    from verl.trainer.ppo.reward import get_custom_reward_fn

    function = "reward.custom_reward_function"
    settings = [f"{function}.path=pkg://opd_ext.rewards.mcq", f"{function}.reward_kwargs.closed=true"]
    grade = get_custom_reward_fn(compose_config(["recipe=sdpo/qwen3_8b", *settings]))
    assert grade(data_source="m", solution_str="B", ground_truth="B", extra_info={})["score"] == 0.0


def test_a_misspelt_argument_is_refused_before_a_run():
    function = "reward.custom_reward_function"
    settings = [f"{function}.path=pkg://opd_ext.rewards.mcq", f"{function}.reward_kwargs.closd=true"]
    with pytest.raises(ConfigError, match="unexpected keyword argument 'closd'"):
        check_reward(compose_config(["recipe=sdpo/qwen3_8b", *settings]), None, Findings())


def test_a_long_response_is_graded_at_once():
    assert graded("<answer>" * 200_000 + "B</answer>") == (1.0, 1.0)


def test_the_prompts_are_the_published_ones():
    """The system message of every row of the released data sets (lasgroup/SDPO, datasets/sciknoweval)."""
    assert SYSTEM_PROMPT == (
        "\nGiven a question and four options, please select the right answer. Respond in the following format:\n"
        "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n\n"
        "For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing "
        'else. Do not restate the answer text. For example, if the answer is "A", just output:\n'
        "<answer>\nA\n</answer>\n"
    )
    assert user_prompt("Which {gas}?", ["O2", "{N2}", "He", "Ne"]) == (
        "Which {gas}?\n\nA: O2\nB: {N2}\nC: He\nD: Ne\nPlease reason step by step."
    )


@pytest.mark.parametrize("count", [0, 27])
def test_a_question_has_as_many_options_as_there_are_letters(count):
    with pytest.raises(ValueError, match=f"a question has {count} options"):
        user_prompt("Q", ["x"] * count)
