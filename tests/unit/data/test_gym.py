# SPDX-License-Identifier: Apache-2.0
"""`opd data gym`: tasks that are made here, graded by their own verifiers wherever the file goes."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.data import gym
from opd_ext.rewards import gym as rewards

pytest.importorskip("reasoning_gym")
TASKS = ["chain_sum", "max_terms=3", "max_digits=2", "leg_counting", "word_sorting"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out = tmp_path_factory.mktemp("gym")
    answer = CliRunner().invoke(app, ["data", "gym", *TASKS, "--out", str(out), "--train", "30", "--val", "10"])
    assert answer.exit_code == 0, answer.output
    return {path.stem: pd.read_parquet(path) for path in out.glob("*.parquet")}


def test_every_row_grades_its_reference_right_and_another_answer_wrong(files):
    for row in files["train"].to_dict("records"):
        truth = row["reward_model"]["ground_truth"]
        graded = rewards.compute_score(row["data_source"], f"So:\nAnswer: {truth}", truth, row["extra_info"])
        assert (graded["score"], graded["acc"], graded["format_ok"]) == (1.0, 1.0, 1.0), row
        for wrong in ("Answer: 123456789", f"The answer is {truth}", "Answer:", "", None, f"Answer: {truth * 1000}"):
            assert rewards.compute_score(row["data_source"], wrong, truth, row["extra_info"])["acc"] == 0.0


def test_tasks_are_mixed_and_no_question_is_there_twice(files):
    questions = [row["question"] for frame in files.values() for row in frame["extra_info"]]
    assert len(questions) == len(set(questions)) == 40
    assert files["train"]["data_source"].value_counts().to_dict() == {
        "gym/chain_sum": 10, "gym/leg_counting": 10, "gym/word_sorting": 10,
    }  # fmt: skip
    assert files["train"]["data_source"].head(10).nunique() > 1
    difficulties = {row["difficulty"] for row in files["train"]["extra_info"]}
    assert {"num_terms 2, num_digits 1", "num_animals 3"} & difficulties
    assert [row["index"] for row in files["val"]["extra_info"]] == list(range(10))


def test_the_same_command_makes_the_same_files(files, tmp_path):
    gym.prepare(gym.parse(TASKS), tmp_path, {"train": 30, "val": 10})
    for name, frame in files.items():
        assert pd.read_parquet(tmp_path / f"{name}.parquet").astype(str).equals(frame.astype(str))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chain_sun"], "chain_sun is no task of reasoning-gym; its tasks are: ab, "),
        (["max_terms=3"], "max_terms=3 belongs to no task: write the task first"),
        (["chain_sum", "max_terms=x"], "max_terms=x: write a number"),
        (["chain_sum", "terms=3"], "chain_sum does not take these options: "),
        (["chain_sum", "max_terms=1"], "chain_sum does not take these options: "),
        (["chain_sum", "chain_sum"], "each once"),
        (["chain_sum", "max_terms=2", "max_digits=1"], "different questions in"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence_and_leaves_nothing(arguments, words, tmp_path):
    answer = CliRunner().invoke(app, ["data", "gym", *arguments, "--out", str(tmp_path / "out")])
    assert answer.exit_code == 2 and answer.output.count("\n") == 1 and words in answer.output
    assert not (tmp_path / "out").exists()


def test_a_row_of_another_file_is_an_error_of_the_data():
    with pytest.raises(ValueError, match="make the file with `opd data gym`"):
        rewards.compute_score("gym/chain_sum", "Answer: 4", "4", {"index": 0})


def test_an_answer_that_a_verifier_cannot_read_is_wrong():
    entry = json.dumps({"question": "", "answer": "[1, 2]", "metadata": {}})
    for odd in ("[[", "\x00", "{1: ", "9" * 900):
        assert rewards.compute_score("gym/number_sorting", f"Answer: {odd}", "", {"entry": entry})["acc"] == 0.0


def test_the_last_number_answers_where_no_line_does(files):
    row = next(row for row in files["train"].to_dict("records") if row["data_source"] == "gym/chain_sum")
    truth = row["reward_model"]["ground_truth"]

    def acc(response: str) -> float:
        return rewards.last_number(row["data_source"], response, truth, row["extra_info"])["acc"]

    right = [f"We add them: 1 + 2 = {truth}.", f"**{truth}**", f"First 3, then\nAnswer: {truth}\nas 5 + 5 = 10"]
    wrong = [f"{truth} is more than 1000000.", f"{truth}\nAnswer: 1000000", f"{truth}5", "nothing", "", None]
    assert [acc(response) for response in right] == [1.0] * 3
    assert [acc(response) for response in wrong] == [0.0] * 6
    sorting = next(row for row in files["train"].to_dict("records") if row["data_source"] == "gym/word_sorting")
    assert rewards.last_number("gym/word_sorting", "3", "a, b", sorting["extra_info"])["acc"] == 0.0


def test_the_request_below_a_question_is_a_setting_and_the_solution_is_an_answer_line(tmp_path):
    for request in ("", "Show your steps."):
        out = tmp_path / (request or "none")
        gym.prepare(gym.parse(["chain_sum"]), out, {"val": 3}, request=request)
        for row in pd.read_parquet(out / "val.parquet").to_dict("records"):
            question, truth = row["extra_info"]["question"], row["reward_model"]["ground_truth"]
            assert row["prompt"][0]["content"] == question + (f"\n\n{request}" if request else "")
            assert row["extra_info"]["solution"] == f"Answer: {truth}"
