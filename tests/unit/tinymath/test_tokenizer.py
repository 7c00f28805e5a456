# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: published prompts unchanged at a few tokens, everything round-trips."""

import random

import pytest
from transformers import AutoTokenizer

from opd_ext.context import prompts
from opd_ext.tinymath.chats import chats, draw_chat
from opd_ext.tinymath.pretrain import SPECS, make_model
from opd_ext.tinymath.problems import DIFFICULTIES, draw_question
from opd_ext.tinymath.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a user gets it: saved and loaded by name."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def render(tokenizer, text, **kwargs):
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Wait, let me check again.\ntens: 8+5+1=14\nAnswer: 843",
        " two  blanks\tand\n\n\nlines ",
        "naïve — 漢字 {braces} \\boxed{7} %",
        prompts.teacher_prompt("What is 1+2?", "text:Be as brief as you can, please."),
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_corpus_round_trips_and_tokenises_the_same_again(tokenizer):
    rng = random.Random(0)
    for index in range(300):
        difficulty = DIFFICULTIES[index % 5]
        chat = draw_chat(rng, draw_question(rng, difficulty), difficulty, chats())
        text = render(tokenizer, chat.prompt) + chat.response + tokenizer.eos_token
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        apart = tokenizer(render(tokenizer, chat.prompt)).input_ids + tokenizer(chat.response).input_ids
        assert [*apart, tokenizer.eos_token_id] == ids, "a reply tokenises alike alone and after its prompt"


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("tens: 9*8+7=79").input_ids] == [
        "tens: ", "9", "*", "8", "+", "7", "=", "7", "9",
    ]  # fmt: skip


@pytest.mark.parametrize("text_id", ["v1", "v2", "v3", "v4", "v5", "pct-20", "pct-80", "words-50"])
def test_published_prompts_cost_a_few_tokens(tokenizer, text_id):
    question = "What is 48+7?"
    bare = len(tokenizer(question).input_ids)
    assert len(tokenizer(prompts.student_prompt(question)).input_ids) == bare + 2
    assert len(tokenizer(prompts.teacher_prompt(question, text_id)).input_ids) <= bare + 6
    assert len(tokenizer(prompts.opsd_teacher_prompt(question, "Answer: 55")).input_ids) <= bare + 12


def test_the_chat_template_is_chatml_and_indifferent_to_thinking(tokenizer):
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, "hello") == expected
    assert render(tokenizer, "hello", enable_thinking=True) == expected
    assert render(tokenizer, "hello", enable_thinking=False) == expected


def test_the_turn_ends_with_a_token_that_is_not_padding(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("Answer: 5<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Answer: 5"


def test_the_models_vocabulary_is_exactly_the_tokenizers(tokenizer):
    model = make_model(SPECS["base"], tokenizer, seed=0)
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert not model.config.tie_word_embeddings
