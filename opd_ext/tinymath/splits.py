# SPDX-License-Identifier: Apache-2.0
"""Train, validation and test problems as parquet files in verl's format."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from opd_ext.context.prompts import student_prompt
from opd_ext.tinymath.problems import concise_solution, distinct_questions, solve

# The held-out splits are drawn first, so that they do not depend on the size of the training split.
SIZES = {"val": 256, "test": 512, "train": 20_000}


def draw_splits(seed: int) -> dict[str, list[tuple[int, str]]]:
    """``(difficulty, question)`` pairs of each split; no question occurs twice, in one split or in two."""
    questions = distinct_questions(random.Random(seed), taken=set())
    return {split: list(itertools.islice(questions, size)) for split, size in SIZES.items()}


def row(split: str, index: int, difficulty: int, question: str) -> dict:
    """One row in the schema of verl's ``RLHFDataset``."""
    return {
        "data_source": "tinymath",
        "prompt": [{"role": "user", "content": student_prompt(question)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(solve(question)[1])},
        "extra_info": {
            "index": index,
            "split": split,
            "question": question,
            "difficulty": difficulty,
            "solution": concise_solution(question),
        },
    }


def write_splits(splits: dict[str, list[tuple[int, str]]], folder: Path) -> None:
    """Write ``<split>.parquet`` for every split into ``folder``."""
    import pandas as pd

    for split, pairs in splits.items():
        rows = [row(split, index, *pair) for index, pair in enumerate(pairs)]
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet", index=False)
