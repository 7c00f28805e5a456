# SPDX-License-Identifier: Apache-2.0
"""From a row of a published file to a row that verl reads: one function per way of publishing, one schema for all."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import pyarrow as pa

from opd_ext.context import prompts
from opd_ext.data import programs
from opd_ext.data.cells import bare_question, boxed, ground_truth, level, plain, user_text
from opd_ext.data.published import Published
from opd_ext.data.tables import schema
from opd_ext.rewards import math_dual, mcq, tools
from opd_ext.rewards.code.truth import read_tests

SCHEMA = schema(difficulty=pa.string(), solution=pa.string(), starter_code=pa.string(), question_id=pa.string())
"""Of every set. Sets with traces have one column more, ``trace``: a right response as text, thinking tags included."""

PROMPTS: dict[str, Callable[[str], str]] = {
    "dapo": prompts.student_prompt,
    "boxed": prompts.boxed_prompt,
    "opsd": prompts.opsd_student_prompt,
}
"""How a question of maths may be asked. ``dapo`` wants an answer line, the others a box."""

_WRAPPED = re.compile(r"^(?:<｜begin▁of▁sentence｜>)?\s*<｜User｜>(.*?)<｜Assistant｜>(.*)$", re.DOTALL)
_BOXED_REQUEST = re.compile(r"\s*Please reason step by step, and put your final answer within \\boxed\{\}\.?\s*$")


@dataclass
class Problem:
    """One row of a published file.

    Attributes:
        index: its place among the rows read.
        reason: why it cannot be used; empty if it can.
        question: bare, for maths and programs; else the whole message of the user.
        message: what the user says, where that is neither the question nor a wording of maths.
        key: what copies of it have in common; the text as it is published.
    """

    index: int
    question: str = ""
    message: str | None = None
    answer: str = ""
    reason: str = ""
    key: str | None = None
    system: str | None = None
    difficulty: str | None = None
    solution: str | None = None
    starter_code: str | None = None
    question_id: str | None = None
    trace: str | None = None


def row_of(problem: Problem, published: Published, split: str, asked: Callable[[str], str], source: str) -> dict:
    """The row that is written; ``asked`` makes the user's message of the question."""
    system = [{"role": "system", "content": problem.system}] if problem.system is not None else []
    message = asked(problem.question) if problem.message is None else problem.message
    row = {
        "data_source": source,
        "prompt": [*system, {"role": "user", "content": message}],
        "ability": published.ability,
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {
            "index": problem.index,
            "split": split,
            "question": problem.question,
            "difficulty": problem.difficulty,
            "solution": problem.solution,
            "starter_code": problem.starter_code,
            "question_id": problem.question_id,
        },
    }
    return row | ({"trace": problem.trace} if published.has_traces else {})


def schema_of(published: Published) -> pa.Schema:
    return SCHEMA.append(pa.field("trace", pa.string())) if published.has_traces else SCHEMA


def wanted_columns(published: Published) -> set[str]:
    """The columns that a set's rows are made of."""
    conditions = {keep.column.partition(".")[0] for split in published.splits for keep in split.keeps}
    return {name for names in published.columns.values() for name in names} | conditions


def read_problem(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """What a row says; its reference is not looked at."""
    problem = KINDS[published.kind](published, cells, index)
    if not problem.reason and not _whole(
        problem.question + (problem.message or "") + problem.answer + (problem.trace or "")
    ):
        problem.reason = "half of a character (a lone surrogate)"
    if not problem.reason and published.has_traces and not problem.trace:
        problem.reason = f"no trace in {' or '.join(published.columns['trace'])}"
    return problem


def check_answer(published: Published, problem: Problem, where: str) -> None:
    """The set's grader takes the reference.

    Raises:
        ValueError: one sentence that begins with ``where``.
    """
    grader = published.grader.rpartition(".")[2]
    if grader == "math_dual":
        math_dual.check_reference(problem.answer, where)
    elif grader == "tools":
        tools.check_reference(problem.answer, where)
    elif grader == "code":
        read_tests(problem.answer, where)
    elif grader == "mcq":
        try:
            mcq.compute_score(published.data_source, "", problem.answer)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


# ---------------------------------------------------------------------- one way of publishing each


def _maths(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    columns = published.columns
    asked, given = _first(columns["question"], cells), [name for name in _answers(published) if name in cells]
    raw = user_text(cells.get(asked))
    problem = Problem(index, key=raw, **_about(published, cells))
    question, opened = _unwrapped(raw or "")
    problem.question, problem.answer = bare_question(question), _reference(published, cells)
    if raw is None:
        problem.reason = f"{asked} is not one user message of text"
    elif not problem.question:
        problem.reason = "empty question"
    elif not problem.answer:
        boxes = columns.get("box", ())
        problem.reason = f"no {'box' if given and set(given) <= set(boxes) else 'answer'} in {' or '.join(given)}"
    elif published.longest_answer and len(problem.answer) > published.longest_answer:
        problem.reason = f"an answer of more than {published.longest_answer} characters"
    problem.trace = _trace(published, cells, opened)
    return problem


def _answers(published: Published) -> list[str]:
    return [name for field in ("answer", "box", "text") for name in published.columns.get(field, ())]


def _reference(published: Published, cells: Mapping[str, Any]) -> str:
    """The first of the answers, boxes and texts that there is."""
    columns = published.columns
    for name in columns.get("answer", ()):
        cell = cells.get(name)
        cell = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
        if answer := ground_truth(name, cell):
            return answer
    for name in columns.get("box", ()):
        if answer := boxed(plain(cells.get(name))):
            return answer
    texts = (plain(cells.get(name)) for name in columns.get("text", ()))
    return next((boxed(text) or text for text in texts if text), "")


def _trace(published: Published, cells: Mapping[str, Any], opened: bool) -> str | None:
    """A right response; ``opened``: the published prompt holds its first tag."""
    names, thinking = published.columns.get("trace", ()), published.columns.get("thoughts")
    text = str(cells.get(_first(names, cells)) or "") if names else ""
    if thinking:
        thoughts, said = str(cells.get(thinking[0]) or "").strip(), text.strip()
        if not (thoughts and said):
            return None
        return f"<think>\n{thoughts}\n</think>\n\n{said}" if published.thinking else f"{thoughts}\n\n{said}"
    begins = opened and "</think>" in text and not text.lstrip().startswith("<think>")
    return (f"<think>\n{text.lstrip()}" if begins else text) or None


def _unwrapped(text: str) -> tuple[str, bool]:
    """The question within R1's chat template and its request for a box, and whether the template opens the thinking."""
    found = _WRAPPED.match(text)
    if not found:
        return text, False
    return _BOXED_REQUEST.sub("", found[1]).strip(), "<think>" in found[2]


def _options(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """GPQA: one right answer and three wrong ones, in an order that the question decides."""
    question, right = (plain(cells.get(published.columns[field][0])) for field in ("question", "answer"))
    wrong = [plain(cells.get(name)) for name in published.columns["wrong"]]
    problem = Problem(index, key=question, system=mcq.SYSTEM_PROMPT, **_about(published, cells))
    if not question or not right or not all(wrong):
        problem.reason = "no question, or fewer than four options"
        return problem
    options = [right, *wrong]
    random.Random(question).shuffle(options)
    problem.question, problem.answer = mcq.user_prompt(question, options), ascii_uppercase[options.index(right)]
    return problem


def _science(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """SciKnowEval: SDPO's rows to the byte, or the hub's in SDPO's words."""
    if "answerKey" not in cells:
        return _calls(published, cells, index)
    question, choices = plain(cells.get("question")), cells.get("choices")
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    problem = Problem(index, key=question, system=mcq.SYSTEM_PROMPT, **_about(published, cells))
    problem.answer = plain(cells.get("answerKey"))
    if not question or not texts or not problem.answer:
        problem.reason = "no question, no choices or no answerKey"
        return problem
    problem.question = mcq.user_prompt(question, [str(text) for text in texts])
    return problem


def _calls(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """A message as it is published, not stripped, with a system message where there is one."""
    prompt, answer, system = (cells.get(published.columns[field][0]) for field in ("question", "answer", "system"))
    problem = Problem(index, key=str(prompt or ""), **_about(published, cells))
    if not isinstance(prompt, str) or not prompt.strip():
        problem.reason = f"no text in {published.columns['question'][0]}"
    elif not plain(answer):
        problem.reason = f"no answer in {published.columns['answer'][0]}"
    else:
        problem.question, problem.answer = prompt, plain(answer)
        problem.system = system if isinstance(system, str) else None
    return problem


class _Text(pickle.Unpickler):
    """Unpickles text and nothing else: a pickle may run whatever it names."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"its private tests name {module}.{name}, and only text is unpickled")


def _contest(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """LiveCodeBench: public tests are JSON, private ones JSON, pickled, packed and in base64; or JSON as well."""
    problem = Problem(index, key=plain(cells.get("question_content")), **_about(published, cells))
    problem.question = str(cells.get("question_content") or "").strip()
    if not problem.question:
        problem.reason = "empty question"
        return problem
    shown = json.loads(cells["public_test_cases"])
    private = cells["private_test_cases"]
    if not private.lstrip().startswith("["):
        private = _Text(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
    tests = shown + json.loads(private)
    truth = {"inputs": [test["input"] for test in tests], "outputs": [test["output"] for test in tests]}
    truth["public"] = len(shown)
    if function := json.loads(cells.get("metadata") or "{}").get("func_name"):
        truth["fn_name"] = function
    problem.answer = json.dumps(truth)
    problem.message = programs.contest_prompt(problem.question, problem.starter_code)
    return problem


def _bare(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """A problem of contests without a reference."""
    question = str(cells.get(_first(published.columns["question"], cells)) or "")
    problem = Problem(index, question, key=question, **_about(published, cells))
    problem.reason = "" if question.strip() else "empty question"
    problem.message = programs.contest_prompt(question, problem.starter_code)
    return problem


def _humaneval(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """A signature to complete. What stands before it, imports and helpers, is there if a program leaves it out."""
    prompt, name = str(cells.get("prompt") or ""), plain(cells.get("entry_point"))
    problem = Problem(index, key=prompt, **_about(published, cells))
    if not prompt.strip() or not name:
        problem.reason = "no prompt or no entry_point"
        return problem
    problem.question, problem.message = prompt.strip(), programs.completion_prompt(prompt)
    before = prompt[: prompt.rfind(f"def {name}(")] if f"def {name}(" in prompt else ""
    check = f"{cells['test']}\n\ncheck({name})\n"
    problem.answer = _checked([check], name, prelude=before, seconds=_seconds(check))
    return problem


def _mbpp(published: Published, cells: Mapping[str, Any], index: int) -> Problem:
    """A task in words and tests that are shown; MBPP+ has more of them, in one program, which are not."""
    text, shown = plain(cells.get(_first(published.columns["question"], cells))), list(cells.get("test_list") or ())
    problem = Problem(index, key=text, **_about(published, cells))
    if not text or not shown:
        problem.reason = "no task or no tests"
        return problem
    problem.question, problem.message = programs.tested_question(text, shown), programs.tested_prompt(text, shown)
    setup = cells.get("test_setup_code") or "\n".join(cells.get("test_imports") or ())
    names = re.findall(r"^def (\w+)\(", str(cells.get("code") or ""), re.MULTILINE)
    name = next((name for name in names if re.search(rf"\b{name}\(", shown[0])), None)
    if whole := cells.get("test"):
        problem.answer = _checked([str(whole)], name, seconds=_seconds(whole))
    else:
        problem.answer = _checked([f"{setup}\n{test}".strip() for test in shown], name, public=len(shown))
    return problem


def _checked(checks: list[str], name: str | None, public: int = 0, prelude: str = "", seconds: float = 0) -> str:
    truth: dict[str, Any] = {"checks": checks, "public": public}
    named = {"fn_name": name, "prelude": prelude, "time_limit": seconds}
    return json.dumps(truth | {key: value for key, value in named.items() if value})


def _seconds(check: str) -> float:
    """The tests of EvalPlus are thousands of inputs in one program; 0: the grader's own limit."""
    return 60.0 if len(check) > _MANY else 0


_MANY = 5_000  # characters of tests

KINDS: dict[str, Callable[[Published, Mapping[str, Any], int], Problem]] = {
    "maths": _maths,
    "options": _options,
    "science": _science,
    "calls": _calls,
    "contest": _contest,
    "bare": _bare,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}


def _first(names: tuple[str, ...], cells: Mapping[str, Any]) -> str:
    return next((name for name in names if name in cells), names[0])


def _about(published: Published, cells: Mapping[str, Any]) -> dict[str, str | None]:
    """What a row says beside question and answer."""
    columns = published.columns
    found: dict[str, str | None] = {}
    for field, names in (("difficulty", "difficulty"), ("question_id", "id"), ("starter_code", "starter_code")):
        found[field] = plain(cells.get(_first(columns[names], cells))) or None if names in columns else None
    if found["difficulty"] and found["difficulty"].lower().startswith("level"):  # `Level 5` of the MATH data
        found["difficulty"] = str(level(found["difficulty"]))
    if found["difficulty"] == "n/a":
        found["difficulty"] = None
    if "solution" in columns:
        found["solution"] = str(cells.get(columns["solution"][0]) or "") or None
    if found["starter_code"] is not None:
        found["starter_code"] = str(cells[_first(columns["starter_code"], cells)])
    return found


def _whole(text: str) -> bool:
    """Whether UTF-8 can write it: JSON may hold one half of a pair, ``\\ud800``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
