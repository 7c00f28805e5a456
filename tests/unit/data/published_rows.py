# SPDX-License-Identifier: Apache-2.0
"""Hand-made rows of every published set, in the columns that it is published with, and files of them."""

import base64
import csv
import gzip
import json
import pickle
import zlib
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from opd_ext.context.prompts import STUDENT_HEADER, boxed_prompt, opsd_student_prompt, student_prompt
from opd_ext.data.catalogue import SETS
from opd_ext.rewards import mcq


def packed(tests: object) -> str:
    """Private tests as LiveCodeBench publishes them."""
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


def contest(date: str, function: str | None = None, private: str | None = None) -> dict:
    shown, hidden = {"input": "1\n2", "output": "3"}, {"input": "5\n5", "output": "10"}
    return {
        "question_title": "Sum", "question_content": f"Add them. {date}", "platform": "leetcode", "question_id": "q1",
        "contest_id": "c", "contest_date": f"{date}T00:00:00", "starter_code": "class Solution:" if function else "",
        "difficulty": "easy", "public_test_cases": json.dumps([shown]),
        "private_test_cases": private or packed(json.dumps([hidden])),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }  # fmt: skip


CALL = json.dumps([{"Action": "find", "Action_Input": '{"what": "axolotl"}'}])
OPTIONS = {"Correct Answer": "red", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}
SDPO = {"idx": 7, "kind": "mcq", "dataset": "sciknoweval", "elo": 1500, "description": "d", "tests": "-"}

# As lcb_runner/prompts/code_generation.py of LiveCodeBench writes them.
FUNCTION = (
    "### Question:\nAdd them. 2025-03-01\n\n### Format: You will use the following starter code to write the solution "
    "to the problem and enclose your code within delimiters.\n```python\nclass Solution:\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
)
STDIN = (
    "### Question:\nAdd  two\nnumbers.\n\n### Format: Read the inputs from stdin solve the problem and write the "
    "answer to stdout (do not directly test on the sample inputs). Enclose your code within delimiters as follows. "
    "Ensure that when the python program runs, it reads the inputs, runs the algorithm and writes output to STDOUT.\n"
    "```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n"
)

# As published: rows in their own columns, those that are left by the filter first; then what the first becomes.
PUBLISHED = {
    "dapo_math_17k": (
        [
            {
                "data_source": "math_dapo",
                "prompt": [{"role": "user", "content": student_prompt(f"1 + {i}?")}],
                "ability": "MATH",
                "reward_model": {"ground_truth": str(1 + i), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": f"{i}"},
            }
            for i in range(5)
        ],
        5,
        {},
    ),
    "math500": (
        [{"problem": "1 + 1?", "solution": "so \\boxed{2}", "answer": "2", "subject": "Algebra", "level": 3,
          "unique_id": "test/1.json"}],
        1,
        {"text": STUDENT_HEADER + "1 + 1?", "answer": "2", "difficulty": "3", "question_id": "test/1.json"},
    ),
    "aime24": (
        [{"id": 60, "problem": "1 + 1?", "solution": "\\boxed{2}", "url": "u"}],
        1,
        {"text": STUDENT_HEADER + "1 + 1?", "answer": "2", "difficulty": None},
    ),
    "aime25": ([{"problem": "1 + 1?", "answer": 2, "id": "0"}], 1, {"answer": "2"}),
    "amc23": ([{"id": 0, "question": "1 + 1?", "answer": 27.0, "url": "u"}], 1, {"answer": "27"}),
    "hmmt25": (
        [{"problem_idx": 1, "problem": "1 + 1?", "answer": "\\frac{1}{576}", "problem_type": ["Algebra"]}],
        1,
        {"answer": "\\frac{1}{576}", "question_id": "1"},
    ),
    "gpqa_diamond": (
        [{"Record ID": "rec1", "Question": "Which colour?", "High-level domain": "Physics", **OPTIONS}],
        1,
        {"difficulty": "Physics", "question_id": "rec1", "system": mcq.SYSTEM_PROMPT},
    ),
    "openthoughts_math_30k": (
        [{"problem": "1 + 1?", "solution": "One and one, \\boxed{2}.", "Answer": "2"}],
        1,
        {"text": opsd_student_prompt("1 + 1?"), "answer": "2", "solution": "One and one, \\boxed{2}."},
    ),
    "openthoughts": (
        [
            {"problem": "1 + 1?", "deepseek_reasoning": "Hm.", "deepseek_solution": "\\boxed{2}",
             "ground_truth_solution": "\\boxed{2}", "domain": domain, "source": "numina_math", "test_cases": None,
             "starter_code": None}
            for domain in ("math", "code")
        ],
        1,
        {"text": boxed_prompt("1 + 1?"), "answer": "2", "trace": "<think>\nHm.\n</think>\n\n\\boxed{2}"},
    ),
    "openmathreasoning": (
        [
            {"expected_answer": "2", "problem_type": kind, "problem_source": "aops", "generation_model": "R1",
             "pass_rate_72b_tir": "0.5", "problem": "1 + 1?", "generated_solution": "<think>\nHm.\n</think>\\boxed{2}",
             "inference_mode": "cot", "used_in_kaggle": True}
            for kind in ("has_answer_extracted", "converted_proof")
        ],
        1,
        {"answer": "2", "difficulty": "0.5", "trace": "<think>\nHm.\n</think>\\boxed{2}"},
    ),
    "deepmath": (
        [
            {"question": "1 + 1?", "final_answer": "2", "difficulty": level, "topic": "t", "r1_solution_1": "long"}
            for level in (6.0, 5.5)
        ],
        1,
        {"text": boxed_prompt("1 + 1?"), "answer": "2", "difficulty": "6", "solution": None},
    ),
    "sciknoweval": (
        [{**SDPO, "answer": "B", "prompt": "Q\n\nA: 1\nB: 2", "system": "\nChoose ä.\n", "embedding": []}],
        1,
        {"text": "Q\n\nA: 1\nB: 2", "answer": "B", "system": "\nChoose ä.\n", "question_id": "7"},
    ),
    "toolalpaca": (
        [{"prompt": "Find it. \n", "description": "d", "idx": 4046, "system": None, "answer": CALL, "kind": "tool"}],
        1,
        {"text": "Find it. \n", "answer": CALL, "system": None},
    ),
    "livecodebench": (
        [contest("2025-03-01", "add"), contest("2024-09-01")],
        1,
        {"text": FUNCTION, "question": "Add them. 2025-03-01", "difficulty": "easy", "starter_code": "class Solution:",
         "question_id": "q1"},
    ),
    "rstar_coder": (
        [
            {"question_id": "s1", "question": text, "starter_code": None, "response": "x", "verified": True,
             "is_passed": passed}
            for text, passed in (("Add  two\nnumbers.", True), ("Add two numbers.", True), ("Sort.", False))
        ],
        1,
        {"text": STDIN, "question": "Add  two\nnumbers.", "answer": "", "starter_code": None},
    ),
    "humaneval": (
        [{"task_id": "HumanEval/0", "prompt": 'import math\n\n\ndef half(x: int) -> int:\n    """Half."""\n',
          "canonical_solution": "    return x // 2\n", "entry_point": "half",
          "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(4) == math.floor(2)\n"}],
        1,
        {"question_id": "HumanEval/0"},
    ),
    "humaneval_plus": (
        [{"task_id": "HumanEval/0", "prompt": 'def half(x: int) -> int:\n    """Half."""\n',
          "canonical_solution": "    return x // 2\n", "entry_point": "half",
          "test": "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert np.allclose(out, exp)\n\n"
                  "def check(candidate):\n    for inp, exp in zip([[4], [6]], [2, 3]):\n"
                  "        assertion(candidate(*inp), exp, 0)\n"}],
        1,
        {"question_id": "HumanEval/0"},
    ),
    "mbpp": (
        [{"task_id": 11, "text": "Write a function to halve.", "code": "def half(x):\n    return x // 2",
          "test_list": ["assert set(half(4) for _ in 'ab') == {2}", "assert half(6) == 3"], "test_setup_code": "",
          "challenge_test_list": []}],
        1,
        {"question_id": "11"},
    ),
    "mbpp_plus": (
        [{"task_id": 2, "code": "def half(x):\n    return x // 2", "prompt": "Write a function to halve.",
          "source_file": "s", "test_imports": [], "test_list": ["assert half(4) == 2"],
          "test": "inputs = [[4], [6]]\nresults = [2, 3]\nfor inp, exp in zip(inputs, results):\n"
                  "    assert half(*inp) == exp\n"}],
        1,
        {"question_id": "2"},
    ),
    "boba200": (
        [{"prompt": "<｜User｜>1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
                    "<｜Assistant｜><think>\n", "answer": "Hm.\n</think>\n\\boxed{2}", "solutions": ["\\boxed{2}"]}],
        1,
        {"text": boxed_prompt("1 + 1?"), "answer": "2", "trace": "<think>\nHm.\n</think>\n\\boxed{2}"},
    ),
    "s1k": (
        [
            {"question": "1 + 1?", "solution": text, "cot_type": kind, "deepseek_grade": "Yes",
             "deepseek_thinking_trajectory": "One and one.", "deepseek_attempt": "\\boxed{2}"}
            for text, kind in (("It is \\boxed{2}.", "math"), ("A long proof. " * 9, "math"), ("red", "science"))
        ],
        1,
        {"text": boxed_prompt("1 + 1?"), "answer": "2", "trace": "One and one.\n\n\\boxed{2}"},
    ),
}  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    """In the format of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
        return path
    opened = gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="")
    with opened as file:
        if name.endswith(".csv"):
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            file.write(json.dumps(rows) if name.endswith(".json") else "".join(f"{json.dumps(r)}\n" for r in rows))
    return path


def called(name: str, folder: Path) -> Path:
    """A file of the set as it is called where it is published, in ``folder``."""
    if name == "sciknoweval":
        return folder / "chemistry" / "train.json"
    file = SETS[name].splits[0].origins[0].files[0].replace("*", "00000-of-00001")
    return folder / (f"tooluse/{file}" if name == "toolalpaca" else file)


def contents(path: Path) -> list[dict]:
    return [
        {
            **row["extra_info"],
            "answer": row["reward_model"]["ground_truth"],
            "text": row["prompt"][-1]["content"],
            "system": row["prompt"][0]["content"] if row["prompt"][0]["role"] == "system" else None,
            "trace": row.get("trace"),
        }
        for row in pq.read_table(path).to_pylist()
    ]
