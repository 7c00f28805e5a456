# SPDX-License-Identifier: Apache-2.0
"""The guides of recipes: files and data sets that exist, and no programs to paste."""

import base64
import json
import pickle
import re
import zlib
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.data.catalogue import SETS
from opd_ext.data.prepare import prepare
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import CONFIG_DIR, PromptsConfig, RewardConfig, compose_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.tokens.tables import SAMPLES, write_table

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("folder", ["ssd", "t3s"])
def test_a_guide_names_its_scripts_and_only_files_that_exist(folder):
    text = (RECIPES / folder / "README.md").read_text()
    for script in (RECIPES / folder).glob("*.sh"):
        assert f"recipes/{folder}/{script.name}" in text
    for path in set(re.findall(r"recipes/[\w/]+\.\w+", text)):
        assert (RECIPES.parent / path).is_file(), path
    for recipe in set(re.findall(rf"opd {folder} recipe=([\w/]+)|`recipe/([\w/]+)\.yaml", text)):
        assert (CONFIG_DIR / "recipe" / f"{''.join(recipe)}.yaml").is_file(), recipe


@pytest.mark.parametrize("script", [*RECIPES.glob("ssd/*.sh"), *RECIPES.glob("t3s/*.sh")], ids=lambda path: path.name)
def test_a_script_names_only_settings_that_exist(script):
    said = script.read_text().replace("$PRESET", "qwen3_4b_instruct")
    for path in set(re.findall(r"(?:opd_ext/config/pipelines/)?((?:(?:recipe/\w+|preset|scale)/)?\w+\.yaml)", said)):
        assert (CONFIG_DIR / path).is_file(), path


# What a program in Python looks like, in a guide.
PROGRAM = re.compile(r"^```python|python3? -c|python3? - |^import \w|^from [\w.]+ import", re.MULTILINE)


@pytest.mark.parametrize("guide", sorted(RECIPES.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_no_guide_holds_a_program_to_paste(guide):
    """Data that takes a program is `opd data`, and what else does is a command, tested as such."""
    assert not PROGRAM.findall(guide.read_text())


@pytest.mark.parametrize("guide", sorted(RECIPES.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_a_guide_names_only_data_sets_that_exist(guide):
    text = guide.read_text()
    named = set(re.findall(r"opd data ([a-z]\w+)", text))
    named |= {name for names in re.findall(r"for set in ([\w ]+);", text) for name in names.split()}
    assert named <= {*SETS, "gym", "model", "tinymath"}


def asked(rows: pd.DataFrame) -> list[str]:
    """The prompts of the recipe."""
    recipe = compose_pipeline("ssd", SSDConfig, ["recipe=ssd/qwen3_4b_instruct"])
    return [messages[0]["content"] for messages in problems.worded(rows, recipe.prompts)]


def livecodebench(folder: Path) -> None:
    """Two problems in the layout of ``code_generation_lite``, one per slice."""

    def problem(name: str, date: str, shown: dict, hidden: dict, function: str | None) -> dict:
        private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([hidden])))).decode()
        return {
            "question_id": name, "question_content": f"Question {name}.", "contest_date": date, "difficulty": "easy",
            "starter_code": "class Solution:" if function else "", "public_test_cases": json.dumps([shown]),
            "private_test_cases": private, "metadata": json.dumps({"func_name": function} if function else {}),
        }  # fmt: skip

    shown, hidden = {"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}
    of_function = {"input": "1\n2", "output": "3"}, {"input": "5\n5", "output": "10"}
    rows = [
        problem("a", "2024-09-01T00:00:00", shown, hidden, None),
        problem("b", "2025-03-01T00:00:00", *of_function, "add"),
        problem("c", "2023-01-01T00:00:00", shown, hidden, None),
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def lcb(tmp_path) -> dict[str, Path]:
    livecodebench(tmp_path)
    return prepare(SETS["livecodebench"], tmp_path / "test.jsonl", tmp_path / "data")


def test_prompts_of_rstar_coder_are_asked_as_the_recipe_asks(tmp_path):
    table = {
        "question": ["Add  two\nnumbers.", "Add two numbers.", "Sort a list."],
        "starter_code": [None, None, "def sort(a):"],
        "is_passed": [True, True, False],
    }
    pd.DataFrame(table).to_parquet(tmp_path / "0.parquet")
    made = prepare(SETS["rstar_coder"], tmp_path / "0.parquet", tmp_path / "out", splits=["all"])
    stdin, function = asked(problems.read_problems(PromptsConfig(file=str(made["all"]))))
    assert "Add  two\nnumbers." in stdin and "stdin" in stdin
    assert "Sort a list." in function and "```python\ndef sort(a):\n```" in function


def test_problems_of_livecodebench_are_asked_as_the_recipe_asks_and_graded_by_all_their_tests(lcb):
    grade = problems.load_grader(RewardConfig("pkg://opd_ext.rewards.code"))
    right = {
        "v5": "a, b = map(int, input().split())\nprint(a + b)",
        "v6": "class Solution:\n    def add(self, a, b):\n        return a + b",
    }
    said = {name: asked(pd.read_parquet(lcb[name]))[0] for name in right}
    assert "Question a." in said["v5"] and "stdin" in said["v5"]
    assert "Question b." in said["v6"] and "```python\nclass Solution:\n```" in said["v6"]
    # The recipe's words stand around the bare question, in the place of those of the row.
    for name, words in said.items():
        (message,) = pd.read_parquet(lcb[name]).iloc[0]["prompt"]
        assert "### Format: " in message["content"] and "###" not in words and words.count("```") == 2
    for name, program in right.items():
        truth = pd.read_parquet(lcb[name]).iloc[0]["reward_model"]["ground_truth"]

        def score(text: str, truth: str = truth) -> float:
            return grade("livecodebench", text, truth)["acc"]

        assert score(f"```python\nwrong\n```\nRather:\n```python\n{program}\n```") == 1.0
        # Right on the first test only: verl's grader would give it one half.
        assert score(f"```python\n{program.replace('a + b', '3')}\n```") == 0.0
        assert score(program) == 0.0  # no block


def test_samples_are_exported_for_the_official_harness(tmp_path, lcb, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["```python\n", "print(1)\n", "print(2)\n", "```\n", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    made.save_pretrained(tmp_path / "model")
    OmegaConf.save({"model": str(tmp_path / "model"), "evaluate": {"file": str(lcb["v6"])}}, tmp_path / "config.yaml")
    rows = {
        "uid": "000000", "sample": [0, 1], "key": "", "prompt_ids": [[0], [0]],
        "response_ids": [[0, 1, 3, 0, 2, 3, 4], [0, 1]], "finish_reason": ["stop", "length"],
    }  # fmt: skip
    write_table(tmp_path / "evaluate/samples/ssd-report-T1.parquet", pd.DataFrame(rows), SAMPLES)
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["harness", ".", "ssd-report-T1"])
    assert answer.exit_code == 0, answer.output
    exported = json.loads((tmp_path / "ssd-report-T1.json").read_text())
    assert [row["question_id"] for row in exported] == ["b"]
    assert [code.split() for code in exported[0]["code_list"]] == [["print(2)"], []]  # the last block; none: nothing
    refusal = CliRunner().invoke(app, ["harness", ".", "T1"])
    assert refusal.exit_code == 2 and refusal.stderr == "opd harness: . has no samples T1: it has ssd-report-T1.\n"


def test_traces_for_t3s_are_rows_that_its_pipeline_reads(tmp_path):
    s1k = {
        "question": ["What is 1 + 1?"], "solution": ["It is \\boxed{2}."], "cot_type": ["math"],
        "deepseek_grade": ["Yes"], "deepseek_thinking_trajectory": ["One and one."], "deepseek_attempt": ["\\boxed{2}"],
    }  # fmt: skip
    pd.DataFrame(s1k).to_parquet(tmp_path / "s1k.parquet")
    made = prepare(SETS["s1k"], tmp_path / "s1k.parquet", tmp_path / "out")
    rows = problems.read_problems(PromptsConfig(file=str(made["train"])))
    assert list(rows["trace"]) == ["One and one.\n\n\\boxed{2}"] and rows["reward_model"][0]["ground_truth"] == "2"
