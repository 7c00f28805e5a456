# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym in verl's format: made here rather than downloaded, each with its own verifier.

A row holds what the verifier needs, so that a file is graded by :mod:`opd_ext.rewards.gym` wherever it goes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from opd_ext.data.tables import schema, write_tables
from opd_ext.rewards.gym import task as verifier
from opd_ext.terminal import LOG_WIDTH, terminal

REQUEST = 'Think step by step. Then write "Answer: " and the final answer, alone on the last line.'
"""What a question asks for besides, unless told otherwise: the line that the grader reads."""

SCHEMA = schema(solution=pa.string(), difficulty=pa.string(), entry=pa.string())


@dataclass(frozen=True)
class Task:
    """A task of reasoning-gym and the options that make it easier or harder."""

    name: str
    options: dict[str, Any]


def parse(words: Sequence[str]) -> list[Task]:
    """``["chain_sum", "max_terms=3", "leg_counting"]``: names, each with the options behind it.

    Raises:
        ValueError: an option stands before any name, is not JSON, or a task is named twice.
    """
    tasks: list[Task] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            tasks.append(Task(word, {}))
        elif not tasks:
            raise ValueError(f"{word} belongs to no task: write the task first, e.g. chain_sum {word}.")
        else:
            try:
                tasks[-1].options[key] = json.loads(value)
            except json.JSONDecodeError:
                raise ValueError(f"{word}: write a number, true, false, a list in JSON or a text in quotes.") from None
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ValueError("name one or more tasks of reasoning-gym, each once, e.g. chain_sum leg_counting.")
    return tasks


def prepare(
    tasks: Sequence[Task],
    out: Path,
    sizes: dict[str, int],
    seed: int = 0,
    request: str = REQUEST,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Path]:
    """Write ``<out>/<split>.parquet`` for every split; no question is in two of them, or twice in one.

    Args:
        tasks: each gives the same share of every split, up to one question.
        sizes: split -> rows.
        seed: of the questions.
        request: stands below every question; empty: the question alone.

    Returns:
        Split -> file.

    Raises:
        ValueError: a task does not exist, does not take an option, or has too few different questions.
        MissingTasksError: reasoning-gym is not installed.
        FileExistsError: files exist with other content, and not ``force``.
    """
    shares = {split: _shares(size, len(tasks)) for split, size in sizes.items()}
    rows: dict[str, list[dict]] = {split: [] for split in sizes}
    for number, task in enumerate(tasks):
        entries = _entries(task, sum(share[number] for share in shares.values()), seed)
        for split, share in shares.items():
            rows[split] += [_row(task.name, split, next(entries), request) for _ in range(share[number])]
    tables = {}
    for split, found in rows.items():
        random.Random(f"{seed} {split}").shuffle(found)  # tasks stand side by side in every batch
        for index, row in enumerate(found):
            row["extra_info"]["index"] = index
        tables[out / f"{split}.parquet"] = pa.Table.from_pylist(found, schema=SCHEMA)
    status = write_tables(tables, force)
    _print(rows, status, console or terminal(LOG_WIDTH))
    return {split: out / f"{split}.parquet" for split in sizes}


def _shares(rows: int, tasks: int) -> list[int]:
    return [rows // tasks + (number < rows % tasks) for number in range(tasks)]


def _entries(task: Task, wanted: int, seed: int) -> Iterator[dict[str, Any]]:
    """So many different questions; tasks draw with replacement, so it may take more draws than questions."""
    judge = verifier(task.name)  # says what is wrong with the name, or that nothing is installed
    import reasoning_gym

    draws = 4 * wanted + 100
    try:
        questions = reasoning_gym.create_dataset(task.name, size=draws, seed=seed, **task.options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{task.name} does not take these options: {' '.join(str(error).split())}") from None
    found: dict[str, dict] = {}
    for number in range(draws):
        if len(found) == wanted:
            break
        entry = questions[number]
        found.setdefault(entry["question"], entry)
    else:
        raise ValueError(f"{task.name} has {len(found)} different questions in {draws} draws, {wanted} are wanted.")
    for entry in found.values():
        if judge.score_answer(entry["answer"], json.loads(_stored(entry))) < 1.0:
            raise ValueError(
                f"{task.name} cannot be used: its verifier refuses its own answer once that was in a file."
            )
    return iter(found.values())


def _stored(entry: dict[str, Any]) -> str:
    return json.dumps(entry, default=str)


def _row(name: str, split: str, entry: dict[str, Any], request: str) -> dict[str, Any]:
    question = entry["question"].strip()
    return {
        "data_source": f"gym/{name}",
        "prompt": [{"role": "user", "content": f"{question}\n\n{request}".strip()}],
        "ability": "reasoning",
        "reward_model": {"style": "rule", "ground_truth": str(entry["answer"])},
        "extra_info": {
            "split": split,
            "question": question,
            "solution": f"Answer: {entry['answer']}",
            "difficulty": _difficulty(entry["metadata"]),
            "entry": _stored(entry),
        },
    }


def _difficulty(metadata: dict[str, Any]) -> str | None:
    """What varies the difficulty within a task, as the question has it, e.g. ``num_terms 3``."""
    varied = metadata.get("difficulty")
    if isinstance(varied, (int, float)):
        return f"{varied:g}"
    known = {key: metadata.get(key) for key in varied or {}}
    return ", ".join(f"{key} {value}" for key, value in known.items() if isinstance(value, (int, float))) or None


def _print(rows: dict[str, list[dict]], status: dict[Path, str], console: Console) -> None:
    table = Table(title=f"Tasks in {next(iter(status)).parent}", title_justify="left")
    for heading in ("file", "", "rows", "tasks", "longest prompt\ncharacters"):
        table.add_column(heading)
    for (path, what), found in zip(status.items(), rows.values(), strict=True):
        tasks = sorted({row["data_source"].removeprefix("gym/") for row in found})
        longest = max((len(row["prompt"][0]["content"]) for row in found), default=0)
        table.add_row(path.name, what, f"{len(found):,}", ", ".join(tasks), f"{longest:,}")
    console.print(table)
