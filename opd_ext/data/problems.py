# SPDX-License-Identifier: Apache-2.0
"""The problems of a split of a published set: read, filtered, without copies, on their side of the published split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from opd_ext.data.published import Origin, Published, Split
from opd_ext.data.reading import columns_of, digest_of, read_rows
from opd_ext.data.rows import Problem, check_answer, read_problem, wanted_columns
from opd_ext.data.sources import files_of
from opd_ext.errors import in_brief

SHUFFLE_SEED = 42
"""Of the published splits of DAPO (CRISP) and SciKnowEval (SDPO)."""


@dataclass
class Tally:
    """What became of the rows of a split."""

    read: int = 0
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, int] = field(default_factory=dict)  # hash of a question -> hash of its first answer
    contested: set[int] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    sha256: str = ""
    status: str = ""

    def add(self, row: dict[str, Any]) -> None:
        question, answer = hash(row["extra_info"]["question"]), hash(row["reward_model"]["ground_truth"])
        if self.answers.setdefault(question, answer) != answer:
            self.contested.add(question)
        self.lengths.append(len(row["prompt"][-1]["content"]))
        self.rows += 1


def usable_problems(
    published: Published,
    split: Split,
    source: Path | None,
    tally: Tally,
    drop_bad: bool,
    read_once: dict[str, Any],
) -> Iterator[Problem]:
    """The usable problems of a split, in the order in which they are written; what is dropped is counted."""
    found: Iterator[Problem] = read_split(published, split, source, tally, drop_bad)
    if published.held_out and not _is_split(published, split, source):
        family = split.name.rpartition("_")[0]
        if family not in read_once:
            read_once[family] = (list(found), tally.dropped.copy(), tally)
        # What no side can have, copies and rows of other domains, is counted on both.
        problems, dropped, first = read_once[family]
        tally.read, tally.sources, tally.dropped = first.read, first.sources, dropped.copy()
        names = [other.name for other in published.splits if other.name.rpartition("_")[0] == family]
        found = iter(divide(published, problems)[names.index(split.name)])
    for problem in found:
        if problem.reason:
            tally.dropped[problem.reason] += 1
        else:
            yield problem


def _is_split(published: Published, split: Split, source: Path | None) -> bool:
    """Whether the files are the splits already, as SDPO's of SciKnowEval are."""
    if published.kind != "science" or source is None:
        return False
    name, path = next(files_of(published, split, split.origins[0], source))
    return "answerKey" not in columns_of(path)


def read_split(
    published: Published, split: Split, source: Path | None, tally: Tally, drop_bad: bool = False
) -> Iterator[Problem]:
    """Every row that the filter keeps, usable or not: ``reason`` tells. Others, and copies, are counted.

    Raises:
        ValueError, OSError: one sentence.
    """
    seen: dict[str, str] = {}
    for origin in split.origins:
        for name, path in files_of(published, split, origin, source):
            tally.sources.append(_source(origin, name, path, source is None))
            for problem in _read_file(published, split, path, tally, drop_bad):
                if not problem.reason and published.distinct:
                    key = problem.key or ""
                    key = " ".join(key.split()) if published.distinct == "spaces" else key
                    if key in seen:
                        other = "" if seen[key] == problem.answer else ", with another answer"
                        tally.dropped[f"a copy of an earlier question{other}"] += 1
                        continue
                    seen[key] = problem.answer
                if origin.difficulty is not None:
                    problem.difficulty = origin.difficulty
                yield problem


def _read_file(published: Published, split: Split, path: Path, tally: Tally, drop_bad: bool) -> Iterator[Problem]:
    there = set(columns_of(path))
    keeps = split.keeps if published.kind != "science" or "answerKey" in there else ()
    _check_columns(published, there, path)
    for keep in keeps:
        if keep.column.partition(".")[0] not in there:
            everything = next((other.name for other in published.splits if not other.keeps), "")
            way = f"; --split {everything} takes every row" if everything else ""
            raise ValueError(
                f"{path} has no column {keep.column}, which the published filter reads ({keep.words}){way}."
            )
    for cells in read_rows(path, wanted_columns(published)):
        index, tally.read = tally.read, tally.read + 1
        if unmet := next((keep for keep in keeps if not keep.holds(cells)), None):
            tally.dropped[f"not: {unmet.words}"] += 1
            continue
        where = f"{path}: row {index} cannot be graded: "
        try:
            problem = read_problem(published, cells, index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: row {index} cannot be read: {in_brief(error)}") from None
        try:
            if not problem.reason and published.grader:
                check_answer(published, problem, where)
        except ValueError as error:
            if not drop_bad:
                raise ValueError(f"{error}; --drop-bad leaves such rows out") from None
            problem.reason = "a reference that the grader cannot read"
        yield problem


def _check_columns(published: Published, there: set[str], path: Path) -> None:
    columns = published.columns
    answers = [name for key in ("answer", "box", "text") for name in columns.get(key, ())]
    if there.isdisjoint(columns["question"]) or (answers and there.isdisjoint(answers)):
        needed = f"a column {' or '.join(columns['question'])}"
        needed += f" and a column {' or '.join(dict.fromkeys(answers))}" if answers else ""
        raise ValueError(
            f"{path} does not look like {published.name}: it needs {needed}, but has {', '.join(sorted(there))}."
        )


def _source(origin: Origin, name: str, path: Path, from_hub: bool) -> dict[str, Any]:
    place = {"repository": origin.repository, "revision": origin.revision or "newest"} if from_hub else {}
    digest = digest_of(path)
    known = {"published": digest == origin.sha256} if origin.sha256 else {}
    return place | {"file": name, "sha256": digest, "bytes": path.stat().st_size} | known


def divide(published: Published, problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """What is kept to train on, and what is held out, by the published shuffle; unusable rows have their place in it.

    SciKnowEval is split by rows, as SDPO's script does (``train_test_split`` of ``datasets``). DAPO is split by
    questions, since a widespread file holds each a hundred times; where each is there once that is CRISP's split.
    """
    if published.kind == "science":
        from datasets import Dataset

        places = Dataset.from_dict({"place": range(len(problems))})
        parts = places.train_test_split(test_size=published.held_out, seed=SHUFFLE_SEED)
        kept, held = ([problems[place] for place in parts[name]["place"]] for name in ("train", "test"))
        return kept, held
    shuffled = [problems[place] for place in pd.Series(range(len(problems))).sample(frac=1, random_state=SHUFFLE_SEED)]
    return split_by_question(shuffled, published.held_out)


def split_by_question(problems: Sequence[Problem], held_out: float) -> tuple[list[Problem], list[Problem]]:
    """The problems of the first questions and those of the last, ``held_out`` of them; copies stay together."""
    keys = pd.Series([problem.index if problem.key is None else problem.key for problem in problems], dtype=object)
    group = pd.factorize(keys)[0]
    questions = int(group.max()) + 1
    kept = questions - math.ceil(round(questions * held_out, 6))
    return (
        [problem for problem, place in zip(problems, group, strict=True) if place < kept],
        [problem for problem, place in zip(problems, group, strict=True) if place >= kept],
    )
