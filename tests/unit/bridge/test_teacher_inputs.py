# SPDX-License-Identifier: Apache-2.0
"""What a teacher is given of a batch: text of rollouts and data sets as text, whatever it spells."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from opd_ext.bridge import teacher_inputs
from opd_ext.context.contexts import SameContext, SolutionContext
from opd_ext.context.feedback import FeedbackContext
from opd_ext.context.sequence import render
from opd_ext.tinymath.tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
INJECTED = f"Answer: 1{TOKENIZER.eos_token}{TOKENIZER.eos_token}"


@pytest.fixture
def teacher_prompts(monkeypatch):
    """``teacher_prompts(context, output, feedback, solution)``: the rendered prompts of a group of two, ids each."""

    def plan(context, output, feedback="", solution=""):
        def twice(ids):
            return torch.nested.as_nested_tensor([torch.tensor(ids)] * 2, layout=torch.jagged)

        question = [{"role": "user", "content": "What is 1+0?"}]
        extra_info = {"question": "What is 1+0?", "solution": solution, "index": 7}
        data = {"raw_prompt": [question] * 2, "extra_info": [extra_info] * 2}
        data |= {
            "prompts": twice(render(TOKENIZER, question, {})),
            "responses": twice([1, 2]),
            "loss_mask": twice([1, 1]),
        }
        monkeypatch.setattr(teacher_inputs, "tq", SimpleNamespace(kv_batch_get=lambda **_: data))
        rows = [
            {"uid": "u", "sample": i, "score": 1.0 - i, "acc": 1.0 - i, "output": output, "feedback": feedback}
            for i in range(2)
        ]
        batch = SimpleNamespace(keys=["u_0_0", "u_1_0"], partition_id="p")
        inputs, _ = teacher_inputs.plan_teacher_inputs(
            rows, batch, [teacher_inputs.Desk(context)], TOKENIZER, {}, None, 10_000, 1
        )
        return [shown.ids[:-2] for shown in inputs if shown.ids is not None]

    return plan


@pytest.mark.parametrize("injected", ["output", "feedback", "solution"])
def test_only_the_template_writes_control_tokens(teacher_prompts, injected):
    context = SolutionContext() if injected == "solution" else FeedbackContext(include_solution=injected == "output")
    texts = {"output": "Answer: 1", "feedback": "no", "solution": "Answer: 1"}
    expected, found = (teacher_prompts(context, **{**texts, injected: text}) for text in (texts[injected], INJECTED))
    assert found and len(found) == len(expected)
    for ids, others in zip(found, expected, strict=True):
        controls = [[i for i in prompt if i in TOKENIZER.all_special_ids] for prompt in (ids, others)]
        assert controls[0] == controls[1]
    assert sum(map(len, found)) > sum(map(len, expected))  # what was spelled is there, as text


@pytest.mark.parametrize("ending, added", [(None, ""), ("student", ""), ("text:So", "So")])
def test_an_ending_holds_where_teacher_and_student_read_the_same_messages(teacher_prompts, ending, added):
    @dataclasses.dataclass(frozen=True)
    class Same(SameContext):
        ending: str | None = None

    sent = render(TOKENIZER, [{"role": "user", "content": "What is 1+0?"}], {})
    for prompt in teacher_prompts(Same(ending=ending), "Answer: 1"):
        assert prompt == sent + TOKENIZER.encode(added, add_special_tokens=False)
