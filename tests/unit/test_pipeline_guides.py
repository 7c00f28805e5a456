# SPDX-License-Identifier: Apache-2.0
"""The guides of recipes: files that exist, and commands for data that work as they stand there."""

import base64
import json
import pickle
import re
import sys
import zlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from opd_ext.data.math import SCHEMA
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


def snippet(folder: str, marker: str) -> str:
    """The one Python program of a guide that contains ``marker``."""
    text = (RECIPES / folder / "README.md").read_text()
    programs = re.findall(r"^python - [^\n]*<<'EOF'\n(.*?)^EOF$", text, re.DOTALL | re.MULTILINE)
    (found,) = [program for program in programs if marker in program]
    return found


@pytest.fixture
def python(tmp_path, monkeypatch, capsys):
    """``python(program, *arguments)``: what the program prints, run in ``tmp_path`` and in this process."""

    def call(program: str, *arguments: object) -> str:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["-", *map(str, arguments)])
            exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return call


def test_questions_for_sdpo_keep_their_own_system_message_byte_by_byte(tmp_path, python):
    rows = [
        {
            "idx": 7,
            "kind": "mcq",
            "answer": answer,
            "prompt": f"Q{answer}\n\nA: 1\nB: 2",
            "system": "\nChoose ä.\n",
            "elo": 1,
        }
        for answer in "BA"
    ]
    for split in ("train", "test"):
        file = tmp_path / "chemistry" / f"{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = python(snippet("sdpo", "row.system"), "out", "chemistry/train.json", "chemistry/test.json")
    assert said == "chemistry_train 2\nchemistry_test 2\n"
    made = pd.read_parquet(tmp_path / "out" / "chemistry_test.parquet")
    assert [list(messages) for messages in made["prompt"]] == [
        [{"role": "system", "content": "\nChoose ä.\n"}, {"role": "user", "content": row["prompt"]}] for row in rows
    ]
    assert [row["ground_truth"] for row in made["reward_model"]] == ["B", "A"]


def test_prompts_for_ssd_are_made_as_the_guide_says(tmp_path, python):
    table = pd.DataFrame(
        {
            "question": ["Add  two\nnumbers.", "Add two numbers.", "Sort a list.", "Sort a list."],
            "starter_code": [None, None, "def sort(a):", "def sort(a):"],
            "is_passed": [True, True, False, False],
            "response": ["x"] * 4,
        }
    )
    table.head(2).to_parquet(tmp_path / "0.parquet")
    table.tail(2).to_parquet(tmp_path / "1.parquet")
    out = tmp_path / "code"
    said = python(snippet("ssd", "rstar_coder"), out, tmp_path / "0.parquet", tmp_path / "1.parquet")
    assert said == "rstar_coder 2\nrstar_coder_passed 1\n"
    rows = problems.read_problems(PromptsConfig(file=str(out / "rstar_coder.parquet")))
    assert [messages[0]["content"] for messages in rows["prompt"]] == ["Add  two\nnumbers.", "Sort a list."]
    stdin, function = asked(rows)
    assert "Add  two\nnumbers." in stdin and "stdin" in stdin
    assert "Sort a list." in function and "```python\ndef sort(a):\n```" in function


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


def test_evaluation_problems_are_made_as_the_guide_says_and_graded_by_all_their_tests(tmp_path, python):
    livecodebench(tmp_path)
    assert python(snippet("ssd", "lcb_v5"), tmp_path, "test.jsonl") == "lcb_v5 1\nlcb_v6 1\n"
    grade = problems.load_grader(RewardConfig("pkg://opd_ext.rewards.code"))
    right = {
        "lcb_v5": "a, b = map(int, input().split())\nprint(a + b)",
        "lcb_v6": "class Solution:\n    def add(self, a, b):\n        return a + b",
    }
    said = {name: asked(pd.read_parquet(tmp_path / f"{name}.parquet"))[0] for name in right}
    assert "Question a." in said["lcb_v5"] and "stdin" in said["lcb_v5"]
    assert "Question b." in said["lcb_v6"] and "```python\nclass Solution:\n```" in said["lcb_v6"]
    for name, program in right.items():
        row = pd.read_parquet(tmp_path / f"{name}.parquet").iloc[0]
        truth = row["reward_model"]["ground_truth"]

        def score(text: str, truth: str = truth) -> float:
            return grade("livecodebench", text, truth)["acc"]

        assert score(f"```python\nwrong\n```\nRather:\n```python\n{program}\n```") == 1.0
        # Right on the first test only: verl's grader would give it one half.
        assert score(f"```python\n{program.replace('a + b', '3')}\n```") == 0.0
        assert score(program) == 0.0  # no block


def test_samples_are_exported_for_the_official_harness_as_the_guide_says(tmp_path, python):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    livecodebench(tmp_path)
    python(snippet("ssd", "lcb_v5"), tmp_path, "test.jsonl")
    words = ["```python\n", "print(1)\n", "print(2)\n", "```", "<end>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "model")
    OmegaConf.save({"model": str(tmp_path / "model")}, tmp_path / "config.yaml")
    rows = {
        "uid": "000000", "sample": [0, 1], "key": "", "prompt_ids": [[0], [0]],
        "response_ids": [[0, 1, 3, 0, 2, 3, 4], [0, 1]], "finish_reason": ["stop", "length"],
    }  # fmt: skip
    write_table(tmp_path / "evaluate/samples/ssd-report-T1.parquet", pd.DataFrame(rows), SAMPLES)
    python(snippet("ssd", "code_list"), tmp_path, tmp_path / "lcb_v6.parquet", "ssd-report-T1")
    exported = json.loads((tmp_path / "ssd-report-T1.json").read_text())
    assert [row["question_id"] for row in exported] == ["b"]
    assert [code.split() for code in exported[0]["code_list"]] == [["print(2)"], []]  # the last block; none: nothing


def test_traces_for_t3s_are_made_as_the_guide_says(tmp_path, python):
    s1k = {
        "question": ["What is 1 + 1?", "Prove it.", "Which colour?"],
        "solution": ["It is \\boxed{2}.", "A long proof. " * 9, "red"],
        "cot_type": ["math", "math", "science"],
        "deepseek_grade": ["Yes", "Yes", "Yes"],
        "deepseek_thinking_trajectory": ["One and one.", "Hm.", "Hm."],
        "deepseek_attempt": ["\\boxed{2}", "QED", "red"],
    }
    pd.DataFrame(s1k).to_parquet(tmp_path / "s1k.parquet")
    python(snippet("t3s", "cot_type"), "s1k.jsonl", "s1k.parquet")
    python(snippet("t3s", "ground_truth"), "train.parquet", "s1k.jsonl", "question", "answer", "trace")
    rows = problems.read_problems(PromptsConfig(file=str(tmp_path / "train.parquet")))
    assert list(rows["trace"]) == ["One and one.\n\n\\boxed{2}"]
    assert rows["reward_model"][0]["ground_truth"] == "2"
    question = rows["prompt"][0][0]["content"]
    assert question.startswith("What is 1 + 1?") and "\\boxed{}" in question


def test_both_years_of_aime_become_one_file_with_a_group_each(tmp_path, python):
    for name in ("aime24", "aime25"):
        row = {
            "data_source": name, "prompt": [{"role": "user", "content": name}], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "1"},
            "extra_info": {"index": 0, "split": "test", "question": name, "difficulty": None},
        }  # fmt: skip
        pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), tmp_path / f"{name}.parquet")
    python(snippet("t3s", "aime24"), tmp_path)
    rows = problems.read_problems(PromptsConfig(file=str(tmp_path / "aime.parquet"), deduplicate=False))
    assert [info["difficulty"] for info in rows["extra_info"]] == [2024, 2025]
