# SPDX-License-Identifier: Apache-2.0
"""Train, validation and test problems as parquet files in verl's format."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from opd_ext.context.prompts import student_prompt
from opd_ext.tinymath.levels import FIRST, Level


def draw_splits(seed: int, level: Level = FIRST) -> dict[str, list[tuple[int, str]]]:
    """``(difficulty, question)`` pairs of each split; no question occurs twice, in one split or in two."""
    questions = level.distinct_questions(random.Random(seed))
    return {split: list(itertools.islice(questions, size)) for split, size in level.sizes.items()}


def row(level: Level, split: str, index: int, difficulty: int, question: str) -> dict:
    """One row in the schema of verl's ``RLHFDataset``."""
    agent = {} if level.play is None else {"agent_name": "tool_agent"}
    return {
        **agent,
        "data_source": level.name,
        "prompt": [{"role": "user", "content": student_prompt(question)}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": level.answer(question)},
        "extra_info": {
            "index": index,
            "split": split,
            "question": question,
            "difficulty": difficulty,
            "solution": level.problems.concise_solution(question),
        },
    }


def write_splits(splits: dict[str, list[tuple[int, str]]], folder: Path, level: Level = FIRST) -> None:
    """Write ``<split>.parquet`` for every split into ``folder``."""
    import pandas as pd

    for split, pairs in splits.items():
        rows = [row(level, split, index, *pair) for index, pair in enumerate(pairs)]
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet", index=False)
