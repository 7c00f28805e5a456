# SPDX-License-Identifier: Apache-2.0
"""The level of several turns: questions, tools, authors and grader agree on what is right and on what went wrong."""

import random

import pandas as pd
import pytest

from opd_ext.errors import ConfigError
from opd_ext.pipelines.problems import check_columns
from opd_ext.tinymath.levels import TOOLS
from opd_ext.tinymath.pretrain import _tokenise, collate
from opd_ext.tinymath.splits import write_splits
from opd_ext.tinymath.tokenizer import TURN_END, TURN_START
from opd_ext.tinymath.tools.chats import chats, textbook
from opd_ext.tinymath.tools.grader import compute_score
from opd_ext.tinymath.tools.problems import (
    DIFFICULTIES,
    MAX_TURNS,
    calculate,
    concise_solution,
    draw_question,
    look_up,
    solve,
)
from opd_ext.tinymath.tools.rollout import play
from opd_ext.tinymath.tools.writing import VERBOSE, Author, calculate_call, look_up_call, tool_says, transcript

QUESTION = "Shop 37. What is the total of 3*pen+9*cup?"
PEN, CUP = look_up(37, "pen"), look_up(37, "cup")
SUM, TOTAL = f"3*{PEN}+9*{CUP}", 3 * PEN + 9 * CUP


def grade(response, question=QUESTION, **more):
    return compute_score("tinymath_tools", response, str(solve(question)[1]), {"question": question, **more})


def test_tools_are_functions_of_what_they_are_asked():
    assert solve(QUESTION) == (SUM, TOTAL) and 10 < PEN < 100
    assert look_up("37", "pen") == PEN != look_up(38, "pen")
    assert [calculate(text) for text in ("3*17+4*25", "7", "2*3-10+1", "2-3*4*5")] == [151, 7, -3, -58]
    for wrong in ("3**9", "1+", "__import__('os')", "9" * 50, "1 + 1", "", 7):
        with pytest.raises(ValueError, match="this is no sum"):
            calculate(wrong)
    for shop, item, said in ((37, "thing", "no thing"), (3, "pen", "no shop 3"), ("x", "pen", "no shop x")):
        with pytest.raises(ValueError, match=said):
            look_up(shop, item)
    assert tool_says(look_up_call(37, "thing")) == "Error executing tool 'look_up': there is no thing"


def test_the_reference_solution_wastes_nothing_and_is_right():
    calls = [look_up_call(37, "pen"), str(PEN), look_up_call(37, "cup"), str(CUP), calculate_call(SUM), str(TOTAL)]
    text = concise_solution(QUESTION)
    assert [line for line in text.split("\n") if line not in ("tool", "assistant")] == [*calls, f"Answer: {TOTAL}"]
    assert grade(text) == {"score": 1.0, "acc": 1.0, "feedback": "", "format_ok": 1.0}


@pytest.mark.parametrize(
    ("changes", "feedback"),
    [
        (((SUM, f"3*{PEN}+8*{CUP}"), (str(TOTAL), "1")), f"One term of the sum is wrong. It should be 9*{CUP}"),
        (((SUM, f"3*{PEN}"), (str(TOTAL), "1")), f"The sum is not the one that was asked for. It should be {SUM}"),
        (((calculate_call(SUM), "Hmm"), (str(TOTAL), "1")), f"The sum was not worked out. It should be {SUM}"),
        (((f"Answer: {TOTAL}", "Answer: 1"),), "The sum is right but the answer does not follow from it."),
        (((f"Answer: {TOTAL}", ""),), "The answer line is missing."),
    ],
)
def test_feedback_names_what_went_wrong_and_keeps_the_total_back(changes, feedback):
    response = concise_solution(QUESTION)
    for old, new in changes:
        assert old in response
        response = response.replace(old, new)
    found = grade(response)
    assert (found["score"], found["feedback"]) == (0.0, feedback) and str(TOTAL) not in feedback


def test_an_answer_counts_in_the_last_turn_alone():
    """A tool that is asked to say the answer does not answer, nor does a turn that calls."""
    response = concise_solution(QUESTION)
    assert grade(response, last_turn=f"Answer: {TOTAL}")["acc"] == 1.0
    assert grade(response, last_turn=calculate_call(f"Answer: {TOTAL}")[:-5])["acc"] == 0.0


def test_authors_stay_within_the_turns_and_go_wrong_as_often_as_they_should():
    rng, right, tokens = random.Random(0), {"ordinary": 0, "sure": 0}, {"ordinary": 0, "brief": 0}
    for index in range(400):
        question = draw_question(rng, DIFFICULTIES[index % 4])
        for name, author in (
            ("ordinary", Author(VERBOSE)),
            ("sure", Author(VERBOSE).careful(0.0)),
            ("brief", Author(VERBOSE).brief(0.0)),
        ):
            done = transcript(question, author, rng)
            assert len(done.written) <= MAX_TURNS and len(done.said) == len(done.written) - 1
            if name in right:
                right[name] += grade(done.as_text(), question)["acc"]
            if name in tokens:
                tokens[name] += sum(map(len, done.written))
    assert right["sure"] == 400 and 0.5 < right["ordinary"] / 400 < 0.7
    assert tokens["brief"] < 0.8 * tokens["ordinary"]


def test_its_rows_name_their_agent_and_are_refused_where_a_model_answers_at_once(tmp_path):
    write_splits({"val": [(1, QUESTION)]}, tmp_path, TOOLS)
    (row,) = pd.read_parquet(tmp_path / "val.parquet").to_dict("records")
    assert row["agent_name"] == "tool_agent" and row["reward_model"]["ground_truth"] == str(TOTAL)
    with pytest.raises(ConfigError, match="for an agent of several turns .agent_name=tool_agent."):
        check_columns(str(tmp_path / "val.parquet"), graded=True)


def test_what_tools_say_is_no_target_of_the_pretraining():
    tokenizer, rng = TOOLS.make_tokenizer(), random.Random(1)
    for corpus in (textbook(), chats()):
        for index in range(40):
            difficulty, question = corpus.question(rng, index)
            chat = corpus.chat(rng, question, difficulty)
            (example,) = _tokenise(tokenizer, [chat])
            ids, own = collate([example], tokenizer.pad_token_id)
            turns = [
                turn.split(f"{TURN_START}assistant\n")[-1]
                for turn in chat.response.split(f"{TURN_END}\n{TURN_START}tool")
            ]
            assert tokenizer.decode(ids[0][own[0]]) == "".join(turn + TURN_END for turn in turns)


def test_a_model_that_does_as_the_authors_do_is_played_as_verl_plays_it():
    """Tokens between turns are those of verl's agent loop; the last turn may call nothing."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    tokenizer = TOOLS.make_tokenizer()
    turns = [f"{look_up_call(37, 'pen')}{TURN_END}", f"Answer: 1{TURN_END}"]

    def write(shown, turn):
        return [tokenizer(turns[turn]).input_ids for _ in shown]

    ((ids, written),) = play(tokenizer, [tokenizer("What?").input_ids], write)
    own = [tokenizer(turn).input_ids for turn in turns]
    asked = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": ""}]
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3", chat_template_kwargs={})
    merged = builder.merge_context_tokens(asked, [*asked, {"role": "tool", "content": str(PEN)}], own[0])
    assert ids == merged.token_ids + own[1] and written == len(own[0]) + len(own[1])
    endless = play(tokenizer, [[1]], lambda shown, turn: [tokenizer(turns[0]).input_ids])
    assert endless[0][1] == MAX_TURNS * len(own[0]) and endless[0][0][-1] == tokenizer.eos_token_id
