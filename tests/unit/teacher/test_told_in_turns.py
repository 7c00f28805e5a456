# SPDX-License-Identifier: Apache-2.0
"""A teacher may be told something in any turn: its sequence has the message, the rollout's ids stay as they are."""

import dataclasses

import pytest

from opd_ext import lessons
from opd_ext.config.compose import compose_config
from opd_ext.context import prompts
from opd_ext.context.contexts import InstructionContext
from opd_ext.context.sequence import render
from opd_ext.context.turns import beginnings, opened, tell
from opd_ext.tinymath.levels import TOOLS
from opd_ext.tinymath.tokenizer import TURN_END, TURN_START
from opd_ext.tinymath.tools.rollout import answered

TOKENIZER = TOOLS.make_tokenizer()
CHAT = [{"role": "user", "content": prompts.student_prompt("Shop 37. What is the total of 3*pen?")}]


def rollout(turns):
    ids, mask = [], []
    for i, turn in enumerate(turns):
        own = TOKENIZER(turn + TURN_END).input_ids
        said = answered(TOKENIZER, str(i)) if i + 1 < len(turns) else []
        ids, mask = [*ids, *own, *said], [*mask, *([1] * len(own)), *([0] * len(said))]
    return ids, mask


def plan(context, ids, mask, score=0.0):
    row = {"uid": "u", "sample": 0, "score": score, "acc": score, "output": "text"}
    prompt = render(TOKENIZER, CHAT)
    infos = [{"question": "Shop 37. What is the total of 3*pen?"}]
    ((shown,), _) = lessons.plan(
        [row], [prompt], [ids], [mask], [CHAT], infos, context, TOKENIZER, {}, None, 999, 1, None
    )
    return shown


def test_a_message_stands_between_what_a_tool_said_and_the_turn_behind_it():
    ids, mask = rollout(["one", "two", "three"])
    said = {2: "Be brief.", 3: "Stop now."}
    read, own = tell(TOKENIZER, ids, mask, said.get, {})
    assert [token for token, used in zip(read, own, strict=True) if used] == ids
    note = f"{TURN_START}user\n{{}}{TURN_END}\n{TURN_START}assistant\n"
    text = TOKENIZER.decode(read)
    assert (
        text.index("0") < text.index(note.format("Be brief.") + "two") < text.index(note.format("Stop now.") + "three")
    )
    for turn in (2, 3):
        only, _ = tell(TOKENIZER, ids, mask, lambda n, turn=turn: said[n] if n == turn else None, {})
        assert len(only) < len(read) and said[turn] in TOKENIZER.decode(only)
    assert tell(TOKENIZER, ids, mask, lambda n: None, {}) == (ids, [1] * len(ids))
    assert beginnings(mask) == [i for i in range(1, len(ids)) if mask[i] > mask[i - 1]]


def test_an_instruction_may_be_repeated_in_every_turn():
    ids, mask = rollout(["one", "two", "three"])
    once, every = (plan(InstructionContext(every_turn=repeat), ids, mask) for repeat in (False, True))
    assert once.own is None and once.ids == once.prompt + ids
    assert every.prompt == once.prompt and every.ids[len(every.prompt) :] != ids
    assert [token for token, used in zip(every.ids[len(every.prompt) :], every.own, strict=True) if used] == ids
    assert TOKENIZER.decode(every.ids).count(prompts.INSTRUCTIONS["v2"]) == 3
    assert TOKENIZER.decode(once.ids).count(prompts.INSTRUCTIONS["v2"]) == 1


def test_a_context_of_ones_own_speaks_when_it_wants_to():
    @dataclasses.dataclass(frozen=True)
    class Coach(InstructionContext):
        in_turns = True

        def told(self, sample, turn):
            return f"It scored {sample['score']:g}." if turn == 3 else None

    ids, mask = rollout(["one", "two", "three"])
    text = TOKENIZER.decode(plan(Coach(), ids, mask, score=1.0).ids)
    assert text.count("It scored 1.") == 1 and text.index("two") < text.index("It scored 1.") < text.index("three")


def test_a_template_that_opens_later_turns_in_another_way_is_told():
    ids, mask = rollout(["one", "two"])
    assert TOKENIZER.decode(opened(TOKENIZER, {})) == f"{TURN_START}assistant\n"
    begin = beginnings(mask)[0]
    broken = ids[: begin - 1] + ids[begin:]
    with pytest.raises(ValueError, match="opens the turn behind a tool's answer in another way"):
        tell(TOKENIZER, broken, mask[: begin - 1] + mask[begin:], lambda n: "Be brief.", {})


def test_the_settings_know_of_it():
    from opd_ext.config import schema

    for words, told in (([], ""), (["opd.context.every_turn=true"], "instruction")):
        config = compose_config(["method=crisp", "scale=cpu_tiny_tools", *words])
        assert schema.load(config.opd).told_in_turns == told
