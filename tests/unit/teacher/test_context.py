# SPDX-License-Identifier: Apache-2.0
"""What the teacher is shown: exact bytes, exact ids, and nothing changed that should stay."""

import copy
import random

import numpy as np
import pytest

from opd_ext.context import (
    TeacherContext,
    build_context,
    build_teacher_sequence,
    get_context,
    register_context,
    render,
)
from opd_ext.context.config import ContextConfig
from opd_ext.context.contexts import InstructionContext
from opd_ext.context.sequence import render_teacher

QUESTION = "What is $2 + 3$?"
HEADER = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
CLAUSE = (
    "The last line of your response should be of the form Answer: $Answer (without quotes) where "
    "$Answer is the answer to the problem."
)
REMINDER = '\n\nRemember to put your answer on its own line after "Answer:".'
STUDENT = HEADER + QUESTION + REMINDER

# Written out once more, independently of the package: the bytes are the method.
INSTRUCTIONS = {
    "v1": (
        "Solve the following math problem concisely and correctly. Be direct — avoid unnecessary "
        "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps "
        "needed to reach the answer."
    ),
    "v2": (
        "Solve the following math problem concisely and correctly. Prioritize a correct final answer "
        "above brevity. For straightforward problems, be direct: avoid unnecessary elaboration, "
        "redundant steps, or restating the problem. For difficult or multi-step problems, do NOT "
        "over-compress: keep every reasoning step needed for correctness, including case analysis, edge "
        "cases, and a brief check of the final answer. Never omit a step that the answer depends on."
    ),
    "v3": (
        "Write only what is needed: omit restatements, narration, and obvious arithmetic; keep every "
        "logically necessary step (case splits, key idea, a one-line check)."
    ),
    "v4": (
        "Write for an expert who wants only the essential reasoning: state the key steps and decisive "
        "computation, skip standard-fact explanations and narration; include required case "
        "analysis/checks."
    ),
    "v5": (
        "Present the solution as a minimal numbered list---each step one short line, no prose, no "
        "restatement; keep required cases and end with a one-line verification."
    ),
    "pct-50": (
        "Solve the following math problem correctly using 50% fewer tokens than you normally would. Be "
        "more concise — cut unnecessary elaboration, redundant steps, and verbose explanations while "
        "preserving correctness."
    ),
    "words-80": (
        "Solve the following math problem correctly in at most 80 words. Be concise — state only the "
        "essential reasoning steps and skip any unnecessary elaboration."
    ),
}


def sample(content=STUDENT, **extra):
    return {"raw_prompt": [{"role": "user", "content": content}], "extra_info": {"index": 17, **extra}}


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_the_instruction_replaces_the_header_byte_for_byte(text):
    (message,) = get_context("instruction")(text=text).messages(sample())
    assert message == {"role": "user", "content": f"{INSTRUCTIONS[text]}\n\n{CLAUSE}\n\n{QUESTION}{REMINDER}"}


def test_v2_is_the_default():
    context = get_context("instruction")
    assert context() == context(text="v2", strip_suffix=True)


def test_parity_mode_repeats_the_reminder_as_the_released_code_does():
    (message,) = get_context("instruction")(strip_suffix=False).messages(sample())
    assert message["content"] == f"{INSTRUCTIONS['v2']}\n\n{CLAUSE}\n\n{QUESTION}{REMINDER}{REMINDER}"


def test_a_template_takes_the_bare_question_and_words_of_its_own():
    sample = {
        "raw_prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "{x} + 1?\n\nShow your steps."}],
        "extra_info": {"question": "{x} + {instruction} 1?"},
    }
    context = InstructionContext("text:Be brief.", template="{question} {instruction}")
    assert context.messages(sample) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "{x} + {instruction} 1? Be brief."},
    ]
    with pytest.raises(ValueError, match="sample .* has no extra_info"):
        context.messages(sample | {"extra_info": {}})


@pytest.mark.parametrize(("template", "missing"), [("{question}", "{instruction}"), ("Be brief.", "{instruction}")])
def test_a_template_that_leaves_something_out_is_refused(template, missing):
    with pytest.raises(ValueError, match=f"has no {missing}"):
        InstructionContext("v1", template=template)


def test_an_unknown_instruction_is_refused_when_the_context_is_built():
    with pytest.raises(ValueError, match="unknown instruction 'v9'"):
        get_context("instruction")(text="v9")


@pytest.mark.parametrize("kind", ["instruction", "solution", "label"])
def test_only_the_last_user_message_is_rewritten(kind):
    chat = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": STUDENT},
        {"role": "assistant", "content": "Answer: 6"},
        {"role": "user", "content": HEADER + "Once more." + REMINDER},
    ]
    given = {
        "raw_prompt": chat,
        "extra_info": {"question": "Once more.", "solution": "2 + 3 = 5", "index": 0},
        "types": ["sign_error"],
        "correct": False,
    }
    shown = get_context(kind)().messages(given)
    assert shown[:3] == chat[:3]
    assert shown[3]["role"] == "user" and shown[3]["content"] != chat[3]["content"]
    assert "Once more." in shown[3]["content"]


def test_solution_is_opsds_teacher_prompt_byte_for_byte():
    (message,) = get_context("solution")().messages(sample(question=QUESTION, solution="2 + 3 = 5"))
    assert message["content"] == (
        "Problem: What is $2 + 3$?\n\nHere is a reference solution to this problem:\n=== Reference "
        "Solution Begin ===\n2 + 3 = 5\n=== Reference Solution End ===\n\n\nAfter reading the reference "
        "solution above, make sure you truly understand the reasoning behind each step — do not copy or "
        "paraphrase it. Now, using your own words and independent reasoning, derive the same final "
        "answer to the problem above. Think step by step, explore different approaches, and don't be "
        "afraid to backtrack or reconsider if something doesn't work out:\n\nPlease reason step by "
        "step, and put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize("extra", [{}, {"solution": None}, {"solution": " "}])
def test_a_missing_solution_names_the_sample(extra):
    with pytest.raises(ValueError, match=r"sample 17 has no extra_info\['solution'\]"):
        get_context("solution")().messages(sample(question=QUESTION, **extra))


def test_a_prompt_without_user_text_names_the_sample():
    given = {"raw_prompt": [{"role": "system", "content": "x"}], "extra_info": {"index": 17}}
    with pytest.raises(ValueError, match="sample 17 has no plain-text user message"):
        get_context("instruction")().messages(given)


@pytest.mark.parametrize("kind", ["same", "instruction", "solution", "label", "feedback"])
def test_the_sample_is_never_changed(kind):
    given = sample(question=QUESTION, solution="5")
    given |= {"types": ["insight"], "correct": True}
    given |= {
        "uid": "u",
        "session": 0,
        "step": 1,
        "feedback": "",
        "group": [{"session": 1, "score": 1, "response": "r"}],
    }
    given["raw_prompt"] = np.array([{"role": "system", "content": "s"}, *given["raw_prompt"]], dtype=object)
    before = copy.deepcopy(given)
    shown = get_context(kind)().messages(given)
    for message in shown:
        message["content"] = "overwritten"
    assert list(given.pop("raw_prompt")) == list(before.pop("raw_prompt")) and given == before


def test_same_shows_the_students_messages():
    assert get_context("same")().messages(sample()) == [{"role": "user", "content": STUDENT}]


def test_unknown_contexts_are_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match="Unknown teacher context 'hint'; allowed: .*instruction.*same.*solution"):
        get_context("hint")


def test_a_user_context_can_be_registered_but_not_take_a_name():
    @register_context("shout")
    class Shout(TeacherContext):
        def messages(self, sample):
            return [{"role": "user", "content": sample["raw_prompt"][-1]["content"].upper()}]

    assert get_context("shout")().messages(sample("hi")) == [{"role": "user", "content": "HI"}]
    with pytest.raises(ValueError, match="teacher context 'same' is registered already"):
        register_context("same")(Shout)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("chat", [1, 3])
def test_render_gives_the_ids_of_verls_agent_loop(tokenizer, kwargs, chat):
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    messages = [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": STUDENT},
        {"role": "assistant", "content": "Answer: 6"},
        {"role": "user", "content": "Sure?"},
    ][-chat:]
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3", chat_template_kwargs=kwargs)
    ids = render(tokenizer, messages, kwargs)
    assert ids == builder.build_initial_tokens(messages)
    assert tokenizer.decode(ids).startswith("<|im_start|>" + messages[0]["role"])
    assert tokenizer.decode(ids).endswith("</think>\n\n" if kwargs.get("enable_thinking") is False else "assistant\n")


def test_render_reads_every_return_type_of_transformers(tokenizer):
    class Returns:
        def __init__(self, value):
            self.value = value

        def apply_chat_template(self, messages, **kwargs):
            return self.value

    flat = [1, 2, 3]
    for value in (
        flat,
        [flat],
        np.array(flat),
        np.array([flat]),
        {"input_ids": flat},
        {"input_ids": np.array([flat])},
    ):
        assert render(Returns(value), [], None) == flat
    encoding = tokenizer("ab")
    assert render(Returns(encoding), [], None) == encoding["input_ids"]


def test_sampled_ids_go_in_and_come_out():
    assert build_teacher_sequence([1, 2], np.array([7, 8]), 4) == [1, 2, 7, 8]
    assert build_teacher_sequence([1, 2], [], 4) == [1, 2]


def test_a_pair_that_is_too_long_on_either_side_is_dropped_whole():
    assert build_teacher_sequence([1, 2, 3], [7, 8], 4) is None
    assert build_teacher_sequence([1], [7, 8], 4, student_prompt_ids=[1, 2, 3]) is None
    assert build_teacher_sequence([1, 2], [7, 8], 4, student_prompt_ids=[1, 2]) == [1, 2, 7, 8]


@pytest.mark.parametrize("kind", ["solution", "label"])
@pytest.mark.parametrize("student", [True, False])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_teacher_and_student_may_think_differently(kind, student, thinking, tokenizer):
    kwargs = {"enable_thinking": student, **get_context(kind)(thinking=thinking).template_kwargs()}
    rendered = tokenizer.decode(render(tokenizer, sample()["raw_prompt"], kwargs))
    thinks = student if thinking is None else thinking
    assert rendered.endswith("assistant\n" if thinks else "</think>\n\n")


@pytest.mark.parametrize("kind", ["same", "instruction", "feedback", "solution", "label"])
def test_by_default_the_teachers_chat_is_rendered_like_the_students(kind):
    context = get_context(kind)()
    assert context.template_kwargs() == {}


@pytest.mark.parametrize("kind", ["solution", "label"])
def test_thinking_is_on_off_or_the_students(kind):
    with pytest.raises(ValueError, match="thinking='on' must be true, false or null"):
        get_context(kind)(thinking="on")


THINKS_ALONE = {"enable_thinking": True}  # as OPSD's teacher does beside a student that does not think


@pytest.mark.parametrize(
    "ending, expected",
    [
        (None, "<|im_start|>assistant\n"),
        ("student", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("text:<think>\n", "<|im_start|>assistant\n<think>\n"),
    ],
)
def test_the_teachers_prompt_ends_as_asked_and_is_the_same_before(ending, expected, tokenizer):
    """Right: the words of the template, which for a student without thinking close the block that they open."""
    messages = [{"role": "system", "content": "You are careful."}, *sample()["raw_prompt"]]
    found = tokenizer.decode(
        render_teacher(
            tokenizer, messages, {"enable_thinking": False}, THINKS_ALONE, get_context("solution")(ending=ending).ending
        )
    )
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert found == chat + expected


def test_with_the_students_ending_a_difference_of_templates_alone_teaches_nothing(tokenizer):
    """Same question, other thinking: without the option the two prompts differ, and the first token pays for it."""
    messages, student = sample()["raw_prompt"], {"enable_thinking": False}
    same, other = (render_teacher(tokenizer, messages, student, THINKS_ALONE, ending) for ending in ("student", None))
    assert same == render(tokenizer, messages, student) != other


@pytest.mark.parametrize("kind", ["solution", "label"])
@pytest.mark.parametrize("ending", ["studnet", "text:", "<think>"])
def test_an_ending_is_the_templates_the_students_or_a_text(kind, ending):
    with pytest.raises(ValueError, match="must be null, student or text:"):
        get_context(kind)(ending=ending)


def test_a_template_that_opens_no_answer_has_no_ending_to_exchange(tokenizer):
    whole = copy.copy(tokenizer)
    whole.chat_template = "{% if add_generation_prompt %}ask: {% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="leave opd.context.ending at null"):
        render_teacher(whole, sample()["raw_prompt"], {}, {}, "student")


def test_options_come_from_the_config_and_unknown_ones_are_refused():
    built = build_context(ContextConfig("instruction", args={"text": "v4"}), tokenizer="ignored")
    assert built == get_context("instruction")(text="v4")
    with pytest.raises(TypeError, match="txt"):
        build_context(ContextConfig("instruction", args={"txt": "v4"}))


def test_a_context_that_declares_a_tokenizer_receives_it(tokenizer):
    config = ContextConfig("feedback", args={"max_body_tokens": 8})
    assert build_context(config, tokenizer).tokenizer is tokenizer
    assert build_context(config).tokenizer is None


def test_a_context_without_numbers_of_its_own_adds_no_metrics():
    context = get_context("same")()
    assert context.describe(sample()) == {} and context.metrics([sample(), sample()]) == {} == context.metrics([])


def labelled(types=("sign_error", "off_by_one", "sign_error"), correct=False):
    return {**sample(question=QUESTION, solution="5"), "types": list(types), "correct": correct}


def test_the_note_stands_behind_the_problem_in_the_same_turn():
    (message,) = get_context("label")().messages(labelled())
    assert message["role"] == "user" and message["content"].startswith(STUDENT + "\n\n[Private note]\n")
    (message,) = get_context("label")().messages(labelled(["insight"], correct=True))
    assert message["content"].startswith(STUDENT + "\n\n[Private note]\n")


def test_a_rollout_without_types_has_no_teacher():
    assert get_context("label")().messages(labelled([])) is None
    assert get_context("label")().messages(labelled([], correct=True)) is None


class OnlyReads(dict):
    """A sample that fails the test when anything but the allowed keys is read."""

    def __getitem__(self, key):
        assert key in ("raw_prompt", "types", "correct"), f"the label context reads {key!r}"
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self[key]


@pytest.mark.parametrize("correct, types", [(False, ["sign_error"]), (True, ["insight", "symmetry"])])
def test_nothing_but_problem_outcome_and_types_reaches_the_labelled_teacher(correct, types, tokenizer):
    context, rng = get_context("label")(), random.Random(5)
    shown = []
    for _ in range(20):
        secret = f"secret{rng.random()}"
        given = {
            "raw_prompt": sample()["raw_prompt"],
            "types": types,
            "correct": correct,
            "extra_info": {"index": rng.random(), "question": secret, "solution": secret, "answer": secret},
            "response": secret,
            "feedback": secret,
            "score": rng.random(),
            "uid": secret,
            "session": rng.randrange(8),
            "step": rng.randrange(300),
            "group": [{"session": 0, "score": rng.random(), "response": secret}],
            "spans": [(rng.randrange(9), 9, secret)],
            "ground_truth": secret,
        }
        messages = context.messages(OnlyReads(given))
        shown.append(render(tokenizer, messages, context.template_kwargs()))
        assert "secret" not in messages[0]["content"]
    assert all(ids == shown[0] for ids in shown)
