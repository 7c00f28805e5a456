# SPDX-License-Identifier: Apache-2.0
"""Tool calls: perfect answers are right however they are written, wrong ones are wrong, and nothing is given away."""

import json
import os
from pathlib import Path

import pytest

from opd_ext.rewards.tools import LONGEST, check_reference, compute_score, stated_calls


def reference(*calls):
    return json.dumps([{"Action": name, "Action_Input": json.dumps(given)} for name, given in calls])


def written(*calls):
    return "\n".join(f"Thought: so\nAction: {name}\nAction Input: {json.dumps(given)}" for name, given in calls)


def graded(response, truth, **options):
    result = compute_score("tooluse", response, truth, **options)
    assert list(result) == ["score", "acc", "feedback", "format_ok"] and result["score"] == result["acc"]
    assert not (result["score"] and result["feedback"])
    return result


# As rows of the released set are: one call, none of its arguments given, nested ones, several calls, an optional one.
ONE = [("getAxolotlFacts", {"category": "habitat", "limit": 3})]
NONE = [("listCountries", {})]
NESTED = [
    ("updateUserProfile", {"userId": "g-1", "profileData": {"picture": "https://e.com/{x}.jpg", "tags": ["a", {}]}})
]
SEVERAL = [("search", {"color": "wild", "page": 1}), ("search", {"color": "albino", "page": 1}), ("facts", {"n": 2})]
OPTIONAL = [("getUserProfile", {"id": "1"}), ("[Optional]updateUserProfile", {"id": "1", "data": {"name": "x"}})]


@pytest.mark.parametrize("calls", [ONE, NONE, NESTED, SEVERAL, OPTIONAL])
def test_a_perfect_answer_is_right(calls):
    truth = reference(*calls)
    for response in (
        written(*calls),
        written(*reversed(calls)),
        f"<think>{written(('f', {}))}</think>{written(*calls)}",
    ):
        assert graded(response, truth) == {"score": 1.0, "acc": 1.0, "feedback": "", "format_ok": 1.0}
        assert graded(response, truth, merged=True)["score"] == (
            calls is not SEVERAL or response != written(*reversed(calls))
        )


@pytest.mark.parametrize(
    "text",
    [
        "Action: f\nAction Input: {ARGS}",
        "**Action:** `f`\n**Action Input:** {ARGS}",
        "**Action**: f\n**Action Input**: {ARGS}",
        "Action: f \r\nAction Input:\r\n{ARGS}\r\n",
        "Action: f\nAction Input:\n```json\n{ARGS}\n```\nObservation: done\nFinal Answer: yes",
        "Action 1: f\nAction Input 1: {ARGS}",
        "- Action: f\n  Action Input: {ARGS} and that is it.",
        "action: f\naction input: {ARGS}",
    ],
)
def test_a_call_is_read_in_any_usual_form(text):
    given = {"a": {"b": [1, "}"]}, "c": 2.0}
    for dumped in (json.dumps(given), json.dumps(given, indent=2)):
        assert graded(text.replace("{ARGS}", dumped), reference(("f", {"c": 2, "a": {"b": [1, "}"]}})))["score"] == 1.0


@pytest.mark.parametrize(
    "calls, given",
    [
        (ONE, [("getAxolotlFacts", {"category": "habitat", "limit": 4})]),
        (ONE, [("getAxolotlFacts", {"category": "habitat"})]),
        (ONE, [("getAxolotlFacts", {"category": "habitat", "limit": 3, "more": 1})]),
        (ONE, [("getAxolotlFacts", {"category": "habitat", "limit": "3"})]),
        (ONE, [("getaxolotlfacts", {"category": "habitat", "limit": 3})]),
        (ONE, [("other", {"category": "habitat", "limit": 3})]),
        (ONE, [*ONE, *ONE]),
        (ONE, [*ONE, *NONE]),
        (NESTED, [("updateUserProfile", {"userId": "g-1", "profileData": {}})]),
        (SEVERAL, SEVERAL[:2]),
        (SEVERAL, [SEVERAL[1], SEVERAL[1], SEVERAL[2]]),
        (OPTIONAL, OPTIONAL[1:]),
        (OPTIONAL, [OPTIONAL[0], ("updateUserProfile", {"id": "2", "data": {"name": "x"}})]),
        ([("f", {"x": 1})], [("f", {"x": True})]),
    ],
)
def test_a_wrong_call_is_wrong_and_the_right_one_is_not_told(calls, given):
    assert graded(written(*given), reference(*calls)) == {"score": 0.0, "acc": 0.0, "feedback": "", "format_ok": 1.0}


def test_an_optional_call_may_be_left_out_or_named_without_its_mark():
    truth = reference(*OPTIONAL)
    for calls in (OPTIONAL[:1], [OPTIONAL[0], ("updateUserProfile", OPTIONAL[1][1])]):
        for merged in (False, True):
            assert graded(written(*calls), truth, merged=merged)["score"] == 1.0


def test_the_released_rule_takes_a_wrong_call_whose_arguments_a_later_one_repeats():
    given = written(("search", {"color": "blue", "page": 1}), *SEVERAL[1:])
    assert (graded(given, reference(*SEVERAL))["score"], graded(given, reference(*SEVERAL), merged=True)["score"]) == (
        0,
        1,
    )


@pytest.mark.parametrize(
    "response, says",
    [
        ("", "no tool call"),
        (None, "no tool call"),
        ("I would ask for facts.", "no tool call"),
        ("Action: f", "no tool call"),
        ("Action: f\nAction Input: none", "no JSON object"),
        ("Action: f\nAction Input: {'x': 1}", "no JSON object"),
        ("Action: f\nAction Input: [1]", "no JSON object"),
        ('Action: f\nAction Input: {"x": ', "no JSON object"),
        ("Action: f\nAction Input: " + '{"x":' * 10_000, "no JSON object"),
    ],
)
def test_feedback_is_about_the_form_alone(response, says):
    result = graded(response, reference(*ONE))
    assert says in result["feedback"] and result["format_ok"] == 0.0
    assert not any(word in result["feedback"] for word in ("getAxolotlFacts", "category", "habitat"))


NO_REFERENCES = [
    "",
    None,
    "{}",
    "[]",
    "[1]",
    '[{"Action": "f"}]',
    '[{"Action": "f", "Action_Input": "["}]',
    '[{"Action": 3, "Action_Input": "{}"}]',
    reference(OPTIONAL[1]),
]


@pytest.mark.parametrize("wrong", NO_REFERENCES)
def test_a_reference_that_asks_for_nothing_is_a_fault_of_the_data(wrong):
    with pytest.raises(ValueError, match="'tooluse': ") as refused:
        compute_score("tooluse", written(*ONE), wrong)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError):
        check_reference(wrong)


def test_a_long_response_is_read_at_once():
    assert graded("Action: \n" * LONGEST + written(*ONE), reference(*ONE))["format_ok"] == 1.0
    for text in ("Action:" + " " * 90_000, "Action: f" + "\n" * 90_000, "Action: f\nAction Input:" + " \t" * 45_000):
        assert not any(stated_calls(text))


@pytest.mark.skipif(
    "OPD_TOOLUSE" not in os.environ, reason="OPD_TOOLUSE names datasets/tooluse/test.json of lasgroup/SDPO"
)
def test_every_perfect_answer_of_the_released_set_is_right():
    right = 0
    rows = [json.loads(line) for line in Path(os.environ["OPD_TOOLUSE"]).read_text().split("\n") if line]
    for row in rows:
        calls = json.loads(row["answer"])
        text = "\n".join(f"Action: {call['Action']}\nAction Input: {call['Action_Input']}" for call in calls)
        right += graded(text, row["answer"])["score"] == graded(text, row["answer"], merged=True)["score"] == 1.0
    assert right == len(rows) == 68
