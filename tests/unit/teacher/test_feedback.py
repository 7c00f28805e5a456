# SPDX-License-Identifier: Apache-2.0
"""SDPO's teacher: which demonstration and which feedback it is shown, and that its prompt is never cut."""

import collections
import copy
import math
import random

import pytest
from tokenizers import processors

from opd_ext.context import prompts
from opd_ext.context.feedback import FeedbackContext, choose_demonstration, remove_thinking, truncate
from opd_ext.context.sequence import render
from opd_ext.tinymath.tokenizer import make_tokenizer

SYSTEM = {"role": "system", "content": "You are {careful}."}
METRICS = (
    "success_group_fraction",
    "success_sample_fraction",
    "feedback_available_fraction",
    "feedback_used_fraction",
    "reprompt_sample_fraction",
)


def rollout(session, score=0.0, response="", feedback=""):
    return {"session": session, "score": score, "response": response, "feedback": feedback}


def samples_of(rollouts, uid="u", prompt="Q", step=3):
    """The rollouts of one prompt as the trainer hands them over; each one also knows its whole group."""
    messages = [SYSTEM, {"role": "user", "content": prompt}]
    return [
        {**one, "uid": uid, "step": step, "raw_prompt": messages, "extra_info": {"index": 0}, "group": rollouts}
        for one in rollouts
    ]


def shown(context, sample):
    """The teacher's user text, or None; everything before it must be the student's."""
    messages = context.messages(sample)
    if messages is None:
        return None
    assert messages[:-1] == [SYSTEM] and messages[-1]["role"] == "user"
    return messages[-1]["content"]


@pytest.fixture(scope="module", params=range(8))
def setting(request, vectors):
    return vectors("sdpo")["teacher_context"]["settings"][request.param]


def context_for(setting, **options):
    return FeedbackContext(
        success_threshold=setting["success_reward_threshold"],
        exclude_own_success=setting["exclude_own_success"],
        include_feedback=setting["include_environment_feedback"],
        feedback_only_without_solution=setting["feedback_only_without_solution"],
        remove_thinking=setting["strip_thinking"],
        **options,
    )


@pytest.fixture(scope="module")
def batch(vectors):
    """The samples of the vectors; a ``session`` is the place in the whole batch."""
    case = vectors("sdpo")["teacher_context"]
    groups = collections.defaultdict(list)
    for index, given in enumerate(case["samples"]):
        groups[given["uid"]].append(rollout(index, given["reward"], given["response"], given["feedback"]))
    return [sample for uid, group in groups.items() for sample in samples_of(group, uid, case["prompts"][uid])]


def test_the_vectors_hold_all_switch_combinations(vectors):
    names = ("exclude_own_success", "include_environment_feedback", "feedback_only_without_solution")
    settings = vectors("sdpo")["teacher_context"]["settings"]
    assert len({tuple(setting[name] for name in names) for setting in settings}) == len(settings) == 8


def test_published_choice_decisions_and_texts_equal_the_vectors(setting, batch):
    context = context_for(setting, demonstration="first")
    for sample, row in zip(batch, setting["rows"], strict=True):
        decision = context.decide(sample)
        chosen = None if decision.demonstration is None else decision.demonstration["session"]
        assert (chosen, decision.uses_feedback) == (row["demo_index"], row["use_feedback"])
        assert decision.has_teacher == bool(row["mask"])
        assert shown(context, sample) == (row["user_text"] if row["mask"] else None)
        if not row["mask"]:
            assert row["user_text"] == sample["raw_prompt"][-1]["content"]


@pytest.mark.parametrize("how", ["first", "random"])
def test_metrics_equal_the_vectors_whichever_demonstration_is_drawn(setting, batch, how):
    context = context_for(setting, demonstration=how)
    assert {name: context.metrics(batch)[name] for name in METRICS} == setting["metrics"]


@pytest.mark.parametrize("how", ["first", "random"])
def test_masks_and_feedback_equal_the_vectors_whichever_demonstration_is_drawn(setting, batch, how):
    context = context_for(setting, demonstration=how)
    for sample, row in zip(batch, setting["rows"], strict=True):
        numbers = context.describe(sample)
        assert numbers["reprompt_sample_fraction"] == row["mask"]
        assert numbers["feedback_used_fraction"] == row["use_feedback"]
        assert numbers["success_sample_fraction"] == (row["demo_index"] is not None)
        assert (context.messages(sample) is not None) == bool(row["mask"])


def test_the_templates_are_those_of_the_vectors(vectors):
    templates = vectors("sdpo")["teacher_context"]["templates"]
    for solution in (None, "S {x} }{"):
        for feedback in (None, "F {0}"):
            if solution or feedback:
                filled = templates["reprompt"].format(
                    prompt="Q {y}",
                    solution=templates["solution"].format(successful_previous_attempt=solution) if solution else "",
                    feedback=templates["feedback"].format(feedback_raw=feedback) if feedback else "",
                )
                assert prompts.sdpo_prompt("Q {y}", solution, feedback) == filled


def test_the_defaults_are_the_released_switches_with_a_drawn_demonstration():
    assert FeedbackContext() == FeedbackContext(
        success_threshold=0.5,
        include_solution=True,
        exclude_own_success=True,
        demonstration="random",
        remove_thinking=True,
        include_feedback=True,
        feedback_only_without_solution=True,
        max_body_tokens=None,
    )


def test_a_score_at_the_threshold_is_a_success_and_below_is_not():
    failed, helped = samples_of([rollout(0), rollout(1, 0.5, "half")])
    assert shown(FeedbackContext(), failed) == "Q\nCorrect solution:\n\nhalf\n\nCorrectly solve the original question."
    assert shown(FeedbackContext(success_threshold=0.51), failed) is None


def test_a_lone_success_has_no_teacher_unless_it_may_see_itself():
    alone, _ = samples_of([rollout(0, 1.0, "mine"), rollout(1)])
    assert shown(FeedbackContext(), alone) is None
    assert "\n\nmine\n\n" in shown(FeedbackContext(exclude_own_success=False), alone)


def test_without_solutions_the_teacher_hears_the_feedback_only():
    failed, _ = samples_of([rollout(0, feedback="Line 2 is wrong."), rollout(1, 1.0, "right")])
    context = FeedbackContext(include_solution=False)
    assert shown(context, failed) == (
        "Q\nThe following is feedback from your unsuccessful earlier attempt:\n\nLine 2 is wrong."
        "\n\nCorrectly solve the original question."
    )
    assert context.describe(failed)["success_group_fraction"] == 1.0, "the group's success is counted all the same"


@pytest.mark.parametrize("blank", ["", "  \n", None])
def test_blank_feedback_is_none(blank):
    (sample,) = samples_of([rollout(0, feedback=blank)])
    assert FeedbackContext().messages(sample) is None


def test_the_students_own_attempt_is_never_in_the_prompt():
    failed, _ = samples_of([rollout(0, response="my attempt", feedback="No."), rollout(1, 1.0, "right")])
    assert "my attempt" not in shown(FeedbackContext(feedback_only_without_solution=False), failed)


def test_thinking_is_removed_block_by_block_and_kept_when_it_never_ends():
    assert remove_thinking("<think>a\nb</think>\n\n x<think></think> y") == "x" + "y"
    assert remove_thinking("<think>a</think>b</think>c") == "b</think>c", "non-greedy"
    assert remove_thinking("<think>cut off") == "<think>cut off"
    failed, _ = samples_of([rollout(0), rollout(1, 1.0, "<think>hm</think>\n\nright")])
    assert "\n\n<think>hm</think>\n\nright\n\n" in shown(FeedbackContext(remove_thinking=False), failed)
    assert "\n\nright\n\n" in shown(FeedbackContext(), failed)


def candidates(*sessions):
    return [rollout(session, 1.0, f"solution {session}") for session in sessions]


def draw(sessions, *, seed=1, step=3, uid="u", session=0):
    drawn = choose_demonstration(candidates(*sessions), "random", seed=seed, step=step, uid=uid, session=session)
    return drawn["session"]


def test_the_draw_does_not_depend_on_the_order_of_the_batch():
    rng = random.Random(0)
    for uid in range(20):
        order = [1, 2, 3, 10, 11]
        expected = draw(order, uid=uid)
        for _ in range(5):
            rng.shuffle(order)
            assert draw(order, uid=uid) == expected


def test_first_is_the_lowest_session_for_the_whole_group_whatever_the_order_of_the_batch():
    for session in range(3):
        for order in ((5, 2, 10), (10, 5, 2), (2, 10, 5)):
            chosen = choose_demonstration(candidates(*order), "first", seed=1, step=3, uid="u", session=session)
            assert chosen["session"] == 2
    assert choose_demonstration([], "first", seed=1, step=3, uid="u", session=0) is None
    assert choose_demonstration([], "random", seed=1, step=3, uid="u", session=0) is None


def test_the_draw_is_uniform():
    draws = 3000
    counts = collections.Counter(draw((1, 2, 3), uid=f"t{i}") for i in range(draws))
    # Five standard deviations of a binomial count; the seed is fixed, so this passes always or never.
    assert all(abs(counts[session] - draws / 3) < 5 * math.sqrt(draws * (1 / 3) * (2 / 3)) for session in (1, 2, 3))


@pytest.mark.parametrize("varied", ["seed", "step", "uid", "session"])
def test_run_step_prompt_and_sample_each_draw_anew(varied):
    assert len({draw(range(1, 9), **{varied: value}) for value in range(20)}) > 3


def test_the_draw_is_the_same_in_every_process():
    assert [draw(range(1, 9), session=session) for session in range(8)] == [5, 3, 6, 7, 8, 7, 8, 8]


def test_unknown_options_are_refused_when_the_context_is_built():
    with pytest.raises(ValueError, match="demonstration='best' does not exist: use random or first"):
        FeedbackContext(demonstration="best")
    with pytest.raises(ValueError, match="the teacher would be shown nothing"):
        FeedbackContext(include_solution=False, include_feedback=False)
    with pytest.raises(ValueError, match="max_body_tokens=0 must be positive"):
        FeedbackContext(max_body_tokens=0)


TEXTS = [
    "plain words, 12 of them",
    "né…漢字🙂🙂 e\u0301 x",
    "🙂" * 9,
    " \n\n lots   of\tspace \n",
    "Answer: 15\n\nAnswer: 6",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("world", [False, True])
def test_a_cut_text_is_a_beginning_within_the_budget(text, world, tokenizer):
    tokenizer = make_tokenizer() if world else tokenizer
    size = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for budget in range(1, size + 2):
        cut = truncate(tokenizer, text, budget)
        assert text.startswith(cut) and len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= budget
        assert tokenizer.decode(tokenizer(cut, add_special_tokens=False)["input_ids"]) == cut
        assert (cut == text) == (budget >= size)


def test_a_character_of_several_tokens_is_kept_whole_or_left_out(tokenizer):
    text = "aé🙂b"  # 1 + 2 + 4 + 1 bytes, one token each
    expected = ["a", "a", "aé", "aé", "aé", "aé", "aé🙂", "aé🙂b"]
    assert [truncate(tokenizer, text, budget) for budget in range(1, 9)] == expected


def test_a_tokenizer_that_reports_blanks_as_empty_still_ends(tokenizer):
    trimming = copy.deepcopy(tokenizer)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "ab   c  "
    assert trimming(text, return_offsets_mapping=True)["offset_mapping"][-1] == (8, 8)
    assert [truncate(trimming, text, budget) for budget in range(1, 9)] == [text[:budget] for budget in range(1, 9)]


def test_long_bodies_are_cut_before_the_message_is_written(tokenizer):
    group = [rollout(0, feedback="f" * 500), rollout(1, 1.0, "<think>" + "t" * 500 + "</think>\n" + "s" * 500)]
    failed, lucky = samples_of(group)
    context = FeedbackContext(feedback_only_without_solution=False, max_body_tokens=40, tokenizer=tokenizer)
    assert shown(context, failed) == prompts.sdpo_prompt("Q", "s" * 40, "f" * 40)
    rendered = tokenizer.decode(render(tokenizer, context.messages(failed)))
    assert rendered.endswith(prompts.SDPO_CLOSING + "<|im_end|>\n<|im_start|>assistant\n")
    assert context.describe(failed)["truncated_sample_fraction"] == 1.0
    assert context.metrics([failed, lucky])["truncated_sample_fraction"] == 0.5


def test_short_bodies_are_shown_whole(tokenizer):
    failed, _ = samples_of([rollout(0), rollout(1, 1.0, "s" * 40)])
    context = FeedbackContext(max_body_tokens=40, tokenizer=tokenizer)
    assert shown(context, failed) == prompts.sdpo_prompt("Q", "s" * 40)
    assert context.describe(failed)["truncated_sample_fraction"] == 0.0


def test_a_token_budget_without_tokenizer_is_one_sentence():
    failed, _ = samples_of([rollout(0), rollout(1, 1.0, "right")])
    with pytest.raises(ValueError, match="build the feedback context with a tokenizer"):
        FeedbackContext(max_body_tokens=40).messages(failed)


def test_groups_count_once_whatever_their_size():
    large = samples_of([rollout(0, 1.0, "a"), *(rollout(i) for i in range(1, 6))], uid="large")
    small = samples_of([rollout(0)], uid="small")
    metrics = FeedbackContext().metrics(large + small)
    assert metrics["success_group_fraction"] == 0.5
    assert metrics["success_sample_fraction"] == 5 / 7
    assert FeedbackContext().metrics([]) == {}


def test_only_failures_may_have_a_teacher():
    """SRPO: what succeeded learns from its reward."""
    group = [{"session": i, "score": float(i == 0), "response": f"try{i}"} for i in range(3)]
    context = FeedbackContext(failures_only=True)
    for rollout in group:
        sample = {
            "raw_prompt": [{"role": "user", "content": "Q"}],
            "uid": "g", "session": rollout["session"], "score": rollout["score"], "feedback": "",
            "response": rollout["response"], "group": group, "step": 1,
        }  # fmt: skip
        assert (context.messages(sample) is None) == (rollout["score"] == 1.0)
