# SPDX-License-Identifier: Apache-2.0
"""The published math data in verl's format: DAPO-Math-17k for training, MATH-500 and AIME for evaluation.

A comparison with published numbers stands or falls with the rows and the bytes around each question, so both
follow CRISP (arXiv 2603.05433) and its release: the same shuffle and split of the training file, and evaluation
prompts that open like the training prompt but do not repeat the reminder at their end (the teacher's do, there as in
training). ``boxed`` is the wording of the evaluation of IW-OPD (arXiv 2606.22600) instead.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from opd_ext.context import prompts
from opd_ext.data.cells import bare_question, boxed, ground_truth, level, plain, user_text
from opd_ext.data.tables import schema, write_tables
from opd_ext.files import read_jsonl
from opd_ext.progress import Progress
from opd_ext.rewards.math_dual import check_reference
from opd_ext.terminal import terminal

SPLIT_SEED = 42

SCHEMA = schema(difficulty=pa.int64())


@dataclass(frozen=True)
class Source:
    """How a published file is laid out.

    Attributes:
        data_source: its name in the rows.
        questions: columns that may hold the question, the first that exists is used.
        answers: columns that may hold the answer; in each row the first that has one is used.
        boxed: columns whose last ``\\boxed{...}`` is the answer, where none of ``answers`` has one.
        sha256: of the published file, if it was published.
    """

    data_source: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    boxed: tuple[str, ...] = ()
    sha256: str | None = None


SOURCES = {
    # `prompt` is a chat or its text, in DAPO's own wording; the processed variants have `solution` for the bare answer.
    "dapo": Source(
        "math_dapo",
        ("prompt", "question", "problem"),
        ("reward_model", "answer", "solution"),
        sha256="c65f47247b9b13cb62321462243c2d1fe8d4ede2d800644a7dda61fea76d4286",
    ),
    "math500": Source("math500", ("problem", "question"), ("answer",), ("solution",)),
    # The published file has the answer only as the box of its solution.
    "aime24": Source(
        "aime24",
        ("problem", "question"),
        ("answer",),
        ("solution",),
        sha256="2602156eb2a0ab64393dc46617a3bfee3451ae3c985a7ea6ac2b55436e094a38",
    ),
    "aime25": Source("aime25", ("problem", "question"), ("answer",), ("solution",)),
}
TRAINING = "dapo"
PROMPTS = {"dapo": prompts.student_prompt, "boxed": prompts.boxed_prompt}


class Problem(NamedTuple):
    """One row of a source; ``reason`` says why it cannot be used, and is empty if it can."""

    index: int  # the row's place in its file
    question: str
    answer: str
    difficulty: int | None
    reason: str


@dataclass
class DataSet:
    """Rows of one file to be written, and how many source rows were left out for which reason."""

    rows: list[dict] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)

    @property
    def questions(self) -> dict[str, set[str]]:
        """Every distinct question with its answers."""
        answers: dict[str, set[str]] = {}
        for row in self.rows:
            answers.setdefault(row["extra_info"]["question"], set()).add(row["reward_model"]["ground_truth"])
        return answers


def prepare(
    files: Mapping[str, Path],
    out: Path,
    *,
    val_fraction: float = 0.2,
    prompt: str = "dapo",
    eval_suffix: bool = False,
    teacher_prompt: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> list[Path]:
    """Read published files and write one parquet file per data set into ``out``.

    ``dapo`` becomes ``dapo_train`` and ``dapo_val``, every other source a file of its own name. A file that
    is there already with the same content is left alone; nothing is written unless everything can be.

    Args:
        files: source name (a key of ``SOURCES``) -> parquet, JSON or JSON-lines file.
        out: destination folder.
        val_fraction: share of the shuffled training source that is held out, in [0, 1).
        prompt: wording of the student's prompts: ``dapo``, or ``boxed``, which asks for the answer in a box.
        eval_suffix: close evaluation prompts with the reminder, as training prompts do. The release does not.
        teacher_prompt: instruction id; adds ``<source>_<id>`` files, the evaluation sets as the teacher reads
            them: the baseline that only asks for brevity.
        force: replace files that exist with other content.
        console: where to print.

    Returns:
        The paths of all files.

    Raises:
        ValueError: an option or a source file makes no sense; one sentence.
        FileNotFoundError: a source does not exist.
        FileExistsError: a file exists with other content.
    """
    console = console or terminal()
    if not files:
        raise ValueError(f"nothing to prepare: name at least one of {', '.join('--' + name for name in SOURCES)}.")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction {val_fraction:g} must be at least 0 and below 1.")
    if prompt not in PROMPTS:
        raise ValueError(f"--prompt {prompt} does not exist: choose one of {', '.join(PROMPTS)}.")
    if prompt != "dapo" and (eval_suffix or teacher_prompt is not None):
        option = "--eval-suffix" if eval_suffix else "--teacher-prompt"
        raise ValueError(f"{option} belongs to the wording of DAPO: leave out --prompt {prompt}.")
    if teacher_prompt is not None:
        prompts.instruction(teacher_prompt)
        if set(files) <= {TRAINING}:
            raise ValueError("--teacher-prompt renders evaluation sets: name at least one besides --dapo.")
    data_sets: dict[str, DataSet] = {}
    with Progress("preparing", len(files), "files", console) as progress:
        for name, path in files.items():
            progress.update(note=str(path))
            frame = read_frame(Path(path))
            _warn_of_other_file(name, Path(path), console)
            if name == TRAINING:
                made = training_sets(frame, path, val_fraction, PROMPTS[prompt])
            else:
                asked = PROMPTS[prompt] if eval_suffix else lambda q: PROMPTS[prompt](q).removesuffix(prompts.REMINDER)
                made = evaluation_sets(name, frame, path, asked, teacher_prompt)
            _refuse_empty(made, path)
            data_sets |= made
            progress.update(advance=1)
        status = write_tables({Path(out) / f"{name}.parquet": _table(data) for name, data in data_sets.items()}, force)
    console.print(_summary(data_sets, status))
    for name, data in data_sets.items():
        _tell_copies(name, data, console)
    return list(status)


# ---------------------------------------------------------------------- reading


def read_frame(path: Path) -> pd.DataFrame:
    """A parquet, JSON (list of objects) or JSON-lines file as a frame; JSON values keep their types.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file.")
    if path.suffix not in (".parquet", ".json", ".jsonl"):
        raise ValueError(f"{path} is none of .parquet, .json, .jsonl.")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.DataFrame(_json_records(path), dtype=object)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error
    if frame.empty:
        raise ValueError(f"{path} holds no rows.")
    return frame


def _json_records(path: Path) -> list[dict]:
    with path.open("rb") as file:
        is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    return json.loads(path.read_text(encoding="utf-8-sig")) if is_list else read_jsonl(path)


def _warn_of_other_file(name: str, path: Path, console: Console) -> None:
    published = SOURCES[name].sha256
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if published and found != published:
        console.print(
            f"WARNING: {path} is not the published file of --{name} (sha256 {found[:12]}..., published "
            f"{published[:12]}...): rows and split may differ from published runs.",
            soft_wrap=True,
            highlight=False,
        )


def _column(frame: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in frame.columns), None)


def problems(name: str, frame: pd.DataFrame, path: Path) -> Iterator[Problem]:
    """Every row of a source, usable or not, in the order of ``frame``; its index labels are the rows' places.

    Raises:
        ValueError: the file has no column for the question or for the answer, or an answer is none.
    """
    source = SOURCES[name]
    question_column = _column(frame, source.questions)
    answer_columns = [name for name in source.answers + source.boxed if name in frame.columns]
    if question_column is None or not answer_columns:
        raise ValueError(
            f"{path} does not look like --{name}: it needs a column {' or '.join(source.questions)} and a column "
            f"{' or '.join(source.answers + source.boxed)}, but has {', '.join(map(str, frame.columns))}."
        )
    levels = frame["level"] if "level" in frame.columns else [None] * len(frame)
    columns = (frame.index, frame[question_column], levels, *(frame[name] for name in answer_columns))
    for index, asked, grade, *answered in zip(*columns, strict=True):
        question, cells = user_text(asked), zip(answer_columns, answered, strict=True)
        answers = (boxed(plain(cell)) if name in source.boxed else ground_truth(name, cell) for name, cell in cells)
        answer = next(filter(None, answers), "")
        reason = ""
        if question is None:
            reason = f"{question_column} is not one user message of text"
        elif not (question := bare_question(question)):
            reason = "empty question"
        elif not _whole(question + answer):
            reason = "half of a character (a lone surrogate)"
        elif not answer:
            boxes = [name for name in answer_columns if name in source.boxed]
            what = "box" if boxes == answer_columns else "answer"
            reason = f"no {what} in {' or '.join(answer_columns)}"
        else:
            check_reference(answer, f"{path}: row {index} cannot be graded: ")
        yield Problem(int(index), question or "", answer, level(grade), reason)


def _whole(text: str) -> bool:
    """Whether UTF-8 can write it: JSON may hold one half of a pair, ``\\ud800``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------------- data sets


def training_sets(
    frame: pd.DataFrame, path: Path, val_fraction: float, asked: Callable[[str], str] = prompts.student_prompt
) -> dict[str, DataSet]:
    """``dapo_train`` and ``dapo_val`` (absent for a fraction of 0), each question as ``asked``: the DAPO prompt.

    Questions are split, not rows: a widespread file holds every one of them a hundred times. The split is made before
    unusable rows are dropped, so that it is the published one whatever is dropped.
    """
    frame = frame.reset_index(drop=True).sample(frac=1, random_state=SPLIT_SEED)
    texts = [user_text(prompt) for prompt in frame[_column(frame, SOURCES[TRAINING].questions) or frame.columns[0]]]
    group = pd.factorize(pd.Series([i if text is None else text for i, text in enumerate(texts)], dtype=object))[0]
    questions = int(group.max()) + 1
    kept = questions - math.ceil(round(questions * val_fraction, 6))
    parts = {"train": frame[group < kept], "val": frame[group >= kept]}
    return {
        f"{TRAINING}_{split}": _data_set(problems(TRAINING, part, path), SOURCES[TRAINING].data_source, split, asked)
        for split, part in parts.items()
        if split == "train" or kept < questions
    }


def evaluation_sets(
    name: str, frame: pd.DataFrame, path: Path, asked: Callable[[str], str], teacher_prompt: str | None
) -> dict[str, DataSet]:
    """``{name: ...}``, each question as ``asked``, and ``{name}_{id}`` as the teacher reads it if that is wanted."""
    read = list(problems(name, frame.reset_index(drop=True), path))
    source = SOURCES[name].data_source
    data_sets = {name: _data_set(read, source, "test", asked)}
    if teacher_prompt is not None:
        label = "own" if teacher_prompt.startswith(prompts.TEXT_PREFIX) else teacher_prompt
        data_sets[f"{name}_{label}"] = _data_set(
            read, f"{source}_{label}", "test", lambda q: prompts.teacher_prompt(q, teacher_prompt)
        )
    return data_sets


def _data_set(read: Iterable[Problem], data_source: str, split: str, render: Callable[[str], str]) -> DataSet:
    data = DataSet()
    for index, question, answer, difficulty, reason in read:
        if reason:
            data.dropped[reason] += 1
            continue
        data.rows.append(
            {
                "data_source": data_source,
                "prompt": [{"role": "user", "content": render(question)}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"index": index, "split": split, "question": question, "difficulty": difficulty},
            }
        )
    return data


# ---------------------------------------------------------------------- writing


def _refuse_empty(data_sets: Mapping[str, DataSet], path: Path) -> None:
    if all(data.rows for data in data_sets.values()):
        return
    if not any(data.rows for data in data_sets.values()):
        dropped = sum((data.dropped for data in data_sets.values()), Counter())
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in dropped.most_common())
        raise ValueError(f"{path} has no row that can be used: {reasons}.")
    name = next(name for name, data in data_sets.items() if not data.rows)
    few = "too few questions that can be used to hold some out, so add more or set --val-fraction 0"
    raise ValueError(f"{path} gives no row to {name}: it has {few}.")


def _tell_copies(name: str, data: DataSet, console: Console) -> None:
    questions = data.questions
    contested = sum(len(answers) > 1 for answers in questions.values())
    if len(data.rows) > len(questions):
        words = f"WARNING: {name} has {len(data.rows):,} rows, {len(questions):,} questions"
        words += f", {contested:,} of them with different answers" if contested else ""
        console.print(f"{words}. Copies stay, all on one side of the split.", soft_wrap=True, highlight=False)


def _table(data: DataSet) -> pa.Table:
    return pa.Table.from_pylist(data.rows, schema=SCHEMA)


def _summary(data_sets: Mapping[str, DataSet], status: Mapping[Path, str]) -> Table:
    """``data_sets`` and ``status`` are in the same order."""
    table = Table(title=f"Math data in {next(iter(status)).parent}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("")
    for heading in ("rows", "questions", "prompt characters\nmedian", "\nlongest"):
        table.add_column(heading, justify="right")
    table.add_column("rows dropped")
    for (path, what), data in zip(status.items(), data_sets.values(), strict=True):
        lengths = [len(row["prompt"][0]["content"]) for row in data.rows] or [0]
        reasons = "; ".join(f"{count:,}: {reason}" for reason, count in data.dropped.most_common())
        numbers = (len(data.rows), len(data.questions), int(np.median(lengths)), max(lengths))
        table.add_row(path.name, what, *(f"{number:,}" for number in numbers), reasons or "none")
    return table
