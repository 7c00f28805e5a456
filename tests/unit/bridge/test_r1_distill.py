# SPDX-License-Identifier: Apache-2.0
"""CRISP on DeepSeek-R1-Distill-Llama-8B: what its chat template makes of student and teacher.

The template here is written for the tests. On 2026-11-26 it was compared with the text of that model's own template
as another public project quotes it (the model's repository itself was not at hand): both render the chats of this file
alike, with and without the generation prompt. Branches of tools, of which CRISP's prompts have none, are left out.
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.context.config import build_context
from opd_ext.context.prompts import student_prompt
from opd_ext.context.sequence import build_teacher_sequence, render, render_teacher, render_text
from opd_ext.objective.alignment import packed_response_rows

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
R1_DISTILL = (
    "{{ bos_token }}"
    "{% for m in messages if m.role == 'system' %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
QUESTION = "What is 1+0?"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens, and like the model's own a tokenizer that puts BOS before whatever it encodes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, USER, ASSISTANT])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, chat_template=R1_DISTILL)
    assert made("x").input_ids[0] == made.bos_token_id
    return made


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Ids of the student's prompt and of the teacher's, by the settings of the recipe."""
    config = compose_config(["recipe=crisp/r1_distill_llama_8b"])
    opd = check(config)
    context, shared = build_context(opd.context, tokenizer), dict(config.data.apply_chat_template_kwargs)
    chat = [{"role": "user", "content": student_prompt(QUESTION)}]
    messages = context.messages({"raw_prompt": chat, "extra_info": {"question": QUESTION}})
    student = render(tokenizer, chat, shared)
    return student, render_teacher(tokenizer, messages, shared, context.template_kwargs(), context.ending)


def test_student_and_teacher_begin_with_one_bos_and_no_system_prompt(prompts, tokenizer):
    for ids in prompts:
        assert [ids.index(tokenizer.bos_token_id), ids.count(tokenizer.bos_token_id)] == [0, 1]
        assert tokenizer.decode(ids).startswith(BOS + USER)
        assert tokenizer.decode(ids).count(USER) == tokenizer.decode(ids).count(ASSISTANT) == 1


def test_both_open_the_block_of_thinking_in_the_prompt(prompts, tokenizer):
    student, teacher = (tokenizer.decode(ids) for ids in prompts)
    assert student.endswith(f"{ASSISTANT}<think>\n") and teacher.endswith(f"{ASSISTANT}<think>\n")
    assert student.count("<think>") == teacher.count("<think>") == 1


def test_the_teacher_alone_is_told_to_be_concise(prompts, tokenizer):
    student, teacher = (tokenizer.decode(ids) for ids in prompts)
    assert QUESTION in student and QUESTION in teacher
    assert "concise" in teacher.lower() and "concise" not in student.lower()


def test_enable_thinking_changes_nothing_in_this_template(tokenizer):
    chat = [{"role": "user", "content": QUESTION}]
    assert render(tokenizer, chat, {"enable_thinking": True}) == render(tokenizer, chat, {"enable_thinking": False})


def test_earlier_turns_lose_their_thoughts_and_a_system_message_has_no_tag(tokenizer):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    chat += [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, {"role": "user", "content": "Again"}]
    said = render_text(tokenizer, chat)
    assert said == f"{BOS}Be kind.{USER}Hi{ASSISTANT}\n\nHello{EOS}{USER}Again{ASSISTANT}<think>\n"


def test_the_rows_that_predict_the_first_response_token_read_the_line_feed_behind_think(prompts, tokenizer):
    response = tokenizer("So 1.", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    for prompt in prompts:
        ids = build_teacher_sequence(prompt, response, 10_000)
        offsets, lengths = torch.tensor([0, len(ids)]), torch.tensor([len(response)])
        rows = packed_response_rows(offsets, torch.tensor([len(prompt)]), lengths)
        assert tokenizer.decode(ids[: rows[0] + 1]).endswith("<think>\n")
        assert [ids[row + 1] for row in rows.tolist()] == response
