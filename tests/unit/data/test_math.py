# SPDX-License-Identifier: Apache-2.0
"""Published math data in verl's format: the published split, the published prompts, and no row lost in silence."""

import io
import json
from dataclasses import replace

import datasets
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.context.contexts import InstructionContext
from opd_ext.context.prompts import ANSWER_CLAUSE, INSTRUCTIONS, REMINDER, STUDENT_HEADER, student_prompt
from opd_ext.data import math as math_data
from opd_ext.data.math import prepare
from opd_ext.data.reading import digest_of
from opd_ext.terminal import terminal


@pytest.fixture
def console():
    return Console(record=True, width=160)


def dapo_rows(count: int) -> list[dict]:
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": student_prompt(f"What is {i} + 1?")}],
            "reward_model": {"ground_truth": str(i + 1), "style": "rule-lighteval/MATH_v2"},
        }
        for i in range(count)
    ]


def parquet(path, rows):
    pd.DataFrame(rows).to_parquet(path)
    return path


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(path) -> list[dict]:
    return [
        {**row["extra_info"], "text": row["prompt"][0]["content"], "answer": row["reward_model"]["ground_truth"]}
        for row in pd.read_parquet(path).to_dict("records")
    ]


def test_the_training_split_is_the_published_one(tmp_path, console):
    # Row count and split sizes of the published file; 42 and the shuffle are pandas' own, so compare with pandas.
    rows, out = 17_398, tmp_path / "out"
    source = parquet(tmp_path / "dapo.parquet", dapo_rows(rows))
    prepare({"dapo": source}, out, console=console)
    train, val = contents(out / "dapo_train.parquet"), contents(out / "dapo_val.parquet")
    assert (len(train), len(val)) == (13_918, 3_480)
    shuffled = pd.Series(range(rows)).sample(frac=1, random_state=42).tolist()
    assert [row["index"] for row in train + val] == shuffled
    assert [row["question"] for row in train[:5]] == [f"What is {i} + 1?" for i in shuffled[:5]]


def test_unusable_rows_are_counted_and_do_not_move_the_split(tmp_path, console):
    rows = dapo_rows(50)
    whole, holed = tmp_path / "whole", tmp_path / "holed"
    prepare({"dapo": parquet(tmp_path / "a.parquet", rows)}, whole, console=console)
    rows[3]["reward_model"]["ground_truth"] = " "
    rows[7]["prompt"] = rows[7]["prompt"] * 2
    rows[9]["prompt"] = [{"role": "user", "content": student_prompt("")}]
    prepare({"dapo": parquet(tmp_path / "b.parquet", rows)}, holed, console=console)
    for name in ("dapo_train.parquet", "dapo_val.parquet"):
        kept = [row for row in contents(whole / name) if row["index"] not in (3, 7, 9)]
        assert contents(holed / name) == kept
    printed = console.export_text()
    for reason in ("no answer", "prompt is not one user message", "empty question"):
        assert f"1: {reason}" in printed


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [{"role": "user", "content": student_prompt("1 + 1?")}], "reward_model": {"ground_truth": "2"}},
        {"prompt": json.dumps([{"role": "user", "content": "1 + 1?"}]), "reward_model": '{"ground_truth": "2"}'},
        {"prompt": "1 + 1?", "solution": "2"},
        {"prompt": student_prompt("1 + 1?") + "\n", "answer": 2},
    ],
    ids=["chat", "JSON", "bare", "text"],
)
def test_every_dapo_layout_gives_the_same_row(tmp_path, columns, console):
    source = jsonl(tmp_path / "dapo.jsonl", [columns])
    prepare({"dapo": source}, tmp_path, val_fraction=0, console=console)
    assert not (tmp_path / "dapo_val.parquet").exists()
    (row,) = contents(tmp_path / "dapo_train.parquet")
    assert (row["question"], row["answer"], row["text"]) == ("1 + 1?", "2", student_prompt("1 + 1?"))


def test_evaluation_prompts_open_like_training_prompts_and_end_with_the_question(tmp_path, console):
    source = jsonl(tmp_path / "m.jsonl", [{"problem": "1 + 1?", "answer": "2", "level": 3}])
    prepare({"math500": source}, tmp_path / "release", console=console)
    prepare({"math500": source}, tmp_path / "suffix", eval_suffix=True, console=console)
    (release,), (suffix,) = (contents(tmp_path / name / "math500.parquet") for name in ("release", "suffix"))
    assert release["text"] == STUDENT_HEADER + "1 + 1?"
    assert suffix["text"] == student_prompt("1 + 1?")
    assert release["difficulty"] == "3"


def test_the_concise_prompt_baseline_is_asked_what_the_teacher_is_asked_in_training(tmp_path, console):
    source = jsonl(tmp_path / "m.jsonl", [{"problem": "1 + 1?", "answer": "2", "level": 3}])
    prepare({"math500": source}, tmp_path, teacher_prompt="v2", console=console)
    plain, concise = (pd.read_parquet(tmp_path / f"{name}.parquet").iloc[0] for name in ("math500", "math500_v2"))
    # The release renders them with its training prompt for the teacher, reminder included (`length_prune_teacher`).
    assert concise["prompt"][0]["content"] == f"{INSTRUCTIONS['v2']}\n\n{ANSWER_CLAUSE}\n\n1 + 1?{REMINDER}"
    assert (plain["data_source"], concise["data_source"]) == ("math500", "math500_v2")
    assert plain["reward_model"] == concise["reward_model"] and plain["extra_info"] == concise["extra_info"]
    in_training = InstructionContext("v2").messages(
        {"raw_prompt": [{"role": "user", "content": student_prompt("1 + 1?")}]}
    )
    assert list(concise["prompt"]) == in_training


def test_boxed_prompts_are_those_of_the_published_evaluation(tmp_path, console):
    """``math_eval/eval_math.py`` of IW-OPD's release; a question that asks for it by itself is not asked twice."""
    ending = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    asked = [student_prompt("1 + 1?"), "1 + 1?", f"1 + 1?{ending}"]
    dapo = jsonl(tmp_path / "d.jsonl", [{"prompt": text, "answer": "2"} for text in asked])
    aime = jsonl(tmp_path / "a.jsonl", [{"problem": "1 + 1?", "answer": 2}])
    prepare({"dapo": dapo, "aime25": aime}, tmp_path, val_fraction=0, prompt="boxed", console=console)
    rows = contents(tmp_path / "dapo_train.parquet") + contents(tmp_path / "aime25.parquet")
    assert [row["text"] for row in rows] == [f"1 + 1?{ending}"] * 4


def test_references_are_text_and_integers_stay_integers(tmp_path, console):
    answers = [70, "\\frac{1}{2}", 33.0, " 5 ", None, 2.5]
    source = jsonl(tmp_path / "a.jsonl", [{"problem": f"q{i}", "answer": a} for i, a in enumerate(answers)])
    prepare({"aime25": source}, tmp_path, console=console)
    rows = contents(tmp_path / "aime25.parquet")
    assert [row["answer"] for row in rows] == ["70", "\\frac{1}{2}", "33", "5", "2.5"]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 5]


def test_aime24_references_are_the_last_box_of_the_solution(tmp_path, console):
    solutions = ["First \\boxed{1}, finally \\boxed{\\frac{2}{3}}.", "no box"]
    source = parquet(tmp_path / "a.parquet", [{"problem": "q", "solution": text} for text in solutions])
    prepare({"aime24": source}, tmp_path, console=console)
    assert [row["answer"] for row in contents(tmp_path / "aime24.parquet")] == ["\\frac{2}{3}"]
    assert "1: no box in solution" in console.export_text()


def test_all_files_concatenate_as_verl_concatenates_them(tmp_path, console):
    sources = {
        "dapo": parquet(tmp_path / "d.parquet", dapo_rows(10)),
        "math500": jsonl(tmp_path / "m.jsonl", [{"problem": "q", "answer": "2", "level": 3}]),
        "aime25": jsonl(tmp_path / "a.jsonl", [{"problem": "q", "answer": 2}]),
    }
    files = prepare(sources, tmp_path / "out", console=console)
    joined = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(file)) for file in files])
    assert [row["difficulty"] for row in joined["extra_info"]] == [None] * 10 + ["3", None]


def test_a_file_that_is_not_the_published_one_is_named_in_one_line(tmp_path, console, monkeypatch):
    source = parquet(tmp_path / "dapo.parquet", dapo_rows(5))
    prepare({"dapo": source}, tmp_path / "out", console=console)
    (warning,) = [line for line in console.export_text().splitlines() if "WARNING" in line]
    assert str(source) in warning and "c65f47247b9b" in warning
    train, val = math_data.SOURCES["dapo"].splits
    mine = replace(train.origins[0], sha256=digest_of(source))
    known = replace(math_data.SOURCES["dapo"], splits=(replace(train, origins=(mine,)), val))
    monkeypatch.setitem(math_data.SOURCES, "dapo", known)
    prepare({"dapo": source}, tmp_path / "out2", console=console)
    assert "WARNING" not in console.export_text()


def test_other_content_is_replaced_only_by_force_and_then_whole(tmp_path, console):
    first, second = (jsonl(tmp_path / f"{answer}.jsonl", [{"problem": "q", "answer": answer}]) for answer in ("1", "2"))
    dapo, out = parquet(tmp_path / "d.parquet", dapo_rows(5)), tmp_path / "out"
    prepare({"aime25": first}, out, console=console)
    before = (out / "aime25.parquet").stat().st_mtime_ns
    prepare({"aime25": first}, out, console=console)
    assert (out / "aime25.parquet").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="--force"):
        prepare({"dapo": dapo, "aime25": second}, out, console=console)
    assert [file.name for file in out.iterdir()] == ["aime25.parquet"]  # neither replaced nor joined by the others
    prepare({"dapo": dapo, "aime25": second}, out, force=True, console=console)
    assert contents(out / "aime25.parquet")[0]["answer"] == "2"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name at least one of --dapo, --math500"),
        (["--math500", "{tmp}/none.jsonl"], "none.jsonl does not exist"),
        (["--math500", "{tmp}/other.jsonl"], "column answer or solution, but has problem, text"),
        (["--math500", "{tmp}/broken.jsonl"], "broken.jsonl cannot be read as jsonl"),
        (["--math500", "{tmp}/broken.parquet"], "broken.parquet cannot be read as parquet"),
        (["--math500", "{tmp}/empty.json"], "empty.json holds no rows"),
        (["--dapo", "{tmp}/solved.jsonl"], "solved.jsonl gives no row to dapo_train"),
        (["--math500", "{tmp}/good.jsonl", "--teacher-prompt", "v9"], "unknown instruction 'v9'"),
        (["--dapo", "{tmp}/good.jsonl", "--teacher-prompt", "v2"], "name at least one besides --dapo"),
        (["--dapo", "{tmp}/good.jsonl", "--val-fraction", "1"], "--val-fraction 1 must be"),
        (
            ["--math500", "{tmp}/good.jsonl", "--prompt", "box"],
            "--prompt box does not exist: choose one of dapo, b",
        ),
        (
            ["--math500", "{tmp}/good.jsonl", "--prompt", "boxed", "--teacher-prompt", "v2"],
            "--teacher-prompt belongs to the wording of DAPO: leave out --prompt boxed",
        ),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tmp_path, arguments, sentence):
    jsonl(tmp_path / "other.jsonl", [{"problem": "q", "text": "t"}])
    jsonl(tmp_path / "good.jsonl", [{"problem": "q", "answer": "1"}])
    solved = [{"prompt": "q", "solution": text} for text in ("2", "We add 1 and 1, so it is \\boxed{2}.")]
    jsonl(tmp_path / "solved.jsonl", solved)
    for name in ("broken.jsonl", "broken.parquet"):
        (tmp_path / name).write_text("{")
    (tmp_path / "empty.json").write_text("[]")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    answer = CliRunner().invoke(app, ["data", "math", "--out", str(tmp_path / "out"), *filled])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("opd data math: ") and sentence in answer.stderr
    assert len(answer.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_it_says(tmp_path):
    source = jsonl(tmp_path / "good.jsonl", [{"problem": "q", "answer": "1"}])
    answer = CliRunner().invoke(app, ["data", "math", "--aime25", str(source), "--out", str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    assert "aime25.parquet" in answer.output and contents(tmp_path / "out" / "aime25.parquet")


# ---------------------------------------------------------------------- files as they are found


def test_copies_of_a_question_lie_on_one_side_of_the_split(tmp_path):
    """The best-known DAPO file holds every question a hundred times: split by rows, nearly every
    validation question is in the training set."""
    page = terminal(file=io.StringIO(), width=200)
    source, out = parquet(tmp_path / "dapo.parquet", dapo_rows(20) * 100), tmp_path / "out"
    prepare({"dapo": source}, out, console=page)
    train, val = ({row["question"] for row in contents(out / f"dapo_{split}.parquet")} for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (16, 4, set())
    assert "dapo_train has 1,600 rows, 16 questions. Copies stay" in page.file.getvalue()


def test_answers_that_contradict_each_other_are_told(tmp_path):
    page = terminal(file=io.StringIO(), width=200)
    source = jsonl(tmp_path / "q.jsonl", [{"problem": "q", "answer": str(i)} for i in range(3)])
    prepare({"math500": source}, tmp_path / "out", console=page)
    assert "3 rows, 1 questions, 1 of them with different answers" in page.file.getvalue()


def _dapo(prompt, **row):
    return {"prompt": prompt, "reward_model": {"ground_truth": "1"}, **row}


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([_dapo([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}])], "not one user message"),
        ([_dapo([{"role": "user", "content": [{"type": "text", "text": "q"}]}])], "not one user message of text"),
        ([_dapo([{"from": "human", "value": "q"}])], "not one user message"),
        ([_dapo("")], "empty question (3)"),
        ([_dapo("one \ud800 half")], "half of a character (a lone surrogate) (3)"),
        ([_dapo("q", reward_model=None)], "no answer in reward_model (3)"),
        ([{"prompt": "q", "answer": text} for text in ("nan", "None", "N/A")], "no answer in answer (3)"),
        ([{"prompt": "q", "solution": "We compute the sum of both and find five"}], "no answer in solution (3)"),
        (
            [_dapo("the only question")],
            "too few questions that can be used to hold some out, so add more or set --val-fraction 0",
        ),
    ],
)
def test_a_set_without_rows_is_refused_with_the_reason(tmp_path, rows, sentence):
    source = jsonl(tmp_path / "rows.jsonl", rows * (3 // len(rows)))
    with pytest.raises(ValueError, match=r"no row (that can be used: |to dapo_train: )") as refusal:
        prepare({"dapo": source}, tmp_path / "out", console=terminal(file=io.StringIO()))
    assert sentence in str(refusal.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "row", "answer"),
    [
        ("math500", {"solution": "so $\\boxed 5$"}, "5"),  # Hendrycks' remove_boxed reads all three
        ("math500", {"solution": "so \\fbox{5}."}, "5"),
        ("math500", {"solution": "so \\boxed{\\frac{1}{2}}"}, "\\frac{1}{2}"),
        ("math500", {"answer": None, "solution": "so \\boxed{5}"}, "5"),
        ("math500", {"answer": "\\boxed{5}"}, "5"),
        ("dapo", {"solution": "We compute ... \\boxed{5}"}, "5"),
        ("dapo", {"solution": "\\text{June 20, year 5}"}, "\\text{June 20, year 5}"),
        ("dapo", {"reward_model": None, "answer": "5"}, "5"),
    ],
)
def test_an_answer_is_found_where_a_file_has_it(tmp_path, source, row, answer):
    question = "prompt" if source == "dapo" else "problem"
    file = jsonl(tmp_path / "rows.jsonl", [{question: "q", **row}])
    prepare({source: file}, tmp_path / "out", val_fraction=0, console=terminal(file=io.StringIO()))
    (written,) = (tmp_path / "out").iterdir()
    assert [row["answer"] for row in contents(written)] == [answer]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\ufeff"])
def test_lines_of_json_are_read_as_json_has_them(tmp_path, mark):
    """Raw separators within strings are valid, and some editors begin a file with a byte order mark."""
    opening, text = (mark, "q") if mark == "\ufeff" else ("", f"a{mark}b")
    lines = [json.dumps({"problem": question, "answer": "1"}, ensure_ascii=False) for question in (text, "r")]
    (tmp_path / "rows.jsonl").write_text(opening + "\n".join(lines) + "\n", encoding="utf-8")
    prepare({"math500": tmp_path / "rows.jsonl"}, tmp_path / "out", console=terminal(file=io.StringIO()))
    assert [row["question"] for row in contents(tmp_path / "out" / "math500.parquet")] == [text, "r"]


def test_a_header_that_is_there_twice_goes_twice(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [_dapo(student_prompt(student_prompt("q")))])
    prepare({"dapo": source}, tmp_path / "out", val_fraction=0, console=terminal(file=io.StringIO()))
    assert contents(tmp_path / "out" / "dapo_train.parquet")[0]["text"] == student_prompt("q")


def test_a_folder_with_brackets_is_shown_as_it_is(tmp_path):
    page, out = terminal(file=io.StringIO(), width=200), tmp_path / "o[red]" / "[" / "x]"
    prepare({"math500": jsonl(tmp_path / "q.jsonl", [{"problem": "q", "answer": "1"}])}, out, console=page)
    assert f"Mathdatain{out}" in "".join(page.file.getvalue().split())  # a long title is cut into lines
