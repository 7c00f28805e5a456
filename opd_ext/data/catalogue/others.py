# SPDX-License-Identifier: Apache-2.0
"""Sets of questions, calls and programs; see :mod:`opd_ext.data.catalogue`."""

from __future__ import annotations

from opd_ext.data.published import Keep, Origin, Published, Split, one

CHOICES, CALLS, PROGRAMS = (f"pkg://opd_ext.rewards.{name}" for name in ("mcq", "tools", "code"))

_LCB, _LCB_AT = "livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
_RSTAR = one("microsoft/rStar-Coder", "seed_sft/*.parquet")
_MBPP = "google-research-datasets/mbpp"
_SDPO = "https://github.com/lasgroup/SDPO/tree/main/datasets"


def _questions(domain: str, train: int, test: int) -> tuple[Split, ...]:
    """SDPO's part of SciKnowEval: level L3, multiple choice, a tenth to test, by the published shuffle."""
    word = domain.lower()
    keeps = (
        Keep("domain", (domain,)),
        Keep("details.level", ("L3",)),
        Keep("type", ("mcq-4-choices", "mcq-2-choices")),
    )
    return tuple(
        Split(
            f"{word}_{part}",
            (Origin("hicai-zju/SciKnowEval", (f"*{word}*", f"*{domain}*"), local=(f"*{word}*{part}*",)),),
            keeps,
            rows,
            usual=word == "chemistry",
        )
        for part, rows in (("train", train), ("test", test))
    )


def _calls(part: str, rows: int) -> Split:
    local = (f"*tool*{part}*", f"{part}.*")
    return Split(part, (Origin(f"{_SDPO}/tooluse", (f"{part}.json",), local=local),), rows=rows)


SETS = (
    Published(
        name="gpqa_diamond",
        title="GPQA-Diamond",
        licence="CC BY 4.0",
        kind="options",
        data_source="gpqa_diamond",
        grader=CHOICES,
        splits=(Split("test", one("Idavidrein/gpqa", "gpqa_diamond.csv"), rows=198),),
        columns={
            "question": ("Question",),
            "answer": ("Correct Answer",),
            "wrong": ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            "difficulty": ("High-level domain",),
            "id": ("Record ID",),
        },
        recipes=("crisp", "trace"),
        ability="science",
        note="Gated: accept its terms on the hub and log in (`hf auth login`). Its authors ask not to show questions "
        "in plain text. The order of the options is drawn from the question; the wording is that of `rewards.mcq`.",
    ),
    Published(
        name="sciknoweval",
        title="SciKnowEval, as SDPO splits it",
        licence="MIT",
        kind="science",
        data_source="sciknoweval",
        grader=CHOICES,
        splits=(
            *_questions("Chemistry", 1890, 210),
            *_questions("Physics", 720, 80),
            *_questions("Biology", 450, 50),
            *_questions("Material", 841, 94),
        ),
        columns={
            "question": ("prompt", "question"),
            "answer": ("answer", "answerKey"),
            "options": ("choices",),
            "system": ("system",),
            "id": ("idx",),
        },
        recipes=("sdpo",),
        ability="science",
        held_out=0.1,
        evaluated="chemistry_test",
        note=f"SDPO's own files ({_SDPO}/sciknoweval) are taken as they are, to the byte; the hub's rows are filtered, "
        "worded and split as its script does, and may differ with the version of the set.",
    ),
    Published(
        name="toolalpaca",
        title="ToolAlpaca, as SDPO trains on it",
        licence="Apache-2.0",
        kind="calls",
        data_source="tooluse",
        grader=CALLS,
        splits=(_calls("train", 0), _calls("test", 68)),
        columns={"question": ("prompt",), "answer": ("answer",), "system": ("system",), "id": ("idx",)},
        recipes=("sdpo",),
        ability="tools",
        note="Not on the hub: SDPO's repository has the files.",
    ),
    Published(
        name="livecodebench",
        title="LiveCodeBench, the slices of v6 and v5",
        licence="CC",
        kind="contest",
        data_source="livecodebench",
        grader=PROGRAMS,
        splits=(
            Split(
                "v6",
                (Origin(_LCB, ("test6.jsonl",), _LCB_AT, local=("*test*.json*",)),),
                (Keep("contest_date", dates=("2025-02-01", "2025-05-01")),),
                rows=131,
            ),
            Split(
                "v5",
                (Origin(_LCB, ("test*.jsonl",), _LCB_AT, local=("*test*.json*",)),),
                (Keep("contest_date", dates=("2024-08-01", "2025-02-01")),),
                rows=374,
            ),
        ),
        columns={
            "question": ("question_content",),
            "public": ("public_test_cases",),
            "private": ("private_test_cases",),
            "function": ("metadata",),
            "starter_code": ("starter_code",),
            "difficulty": ("difficulty",),
            "id": ("question_id",),
        },
        recipes=("ssd", "sdpo"),
        ability="code",
        evaluated="v6",
        note="`v5` reads all six files, 4.5 GB. Private tests are pickled text; anything else in them is refused.",
    ),
    Published(
        name="humaneval",
        title="HumanEval",
        licence="MIT",
        kind="humaneval",
        data_source="humaneval",
        grader=PROGRAMS,
        splits=(
            Split("test", one("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"), rows=164),
        ),
        columns={"question": ("prompt",), "tests": ("test",), "function": ("entry_point",), "id": ("task_id",)},
        recipes=(),
        ability="code",
        note="Tests run in the program's process: to evaluate, not to train.",
    ),
    Published(
        name="humaneval_plus",
        title="HumanEval+",
        licence="Apache-2.0",
        kind="humaneval",
        data_source="humaneval_plus",
        grader=PROGRAMS,
        splits=(Split("test", one("evalplus/humanevalplus", "data/test-*.parquet"), rows=164),),
        columns={"question": ("prompt",), "tests": ("test",), "function": ("entry_point",), "id": ("task_id",)},
        recipes=(),
        ability="code",
        note="As HumanEval, with EvalPlus's tests, 60 s for all of a problem.",
    ),
    Published(
        name="mbpp",
        title="MBPP",
        licence="CC BY 4.0",
        kind="mbpp",
        data_source="mbpp",
        grader=PROGRAMS,
        splits=(
            Split("test", (Origin(_MBPP, ("full/test-*.parquet",), local=("*full/test*", "*mbpp*")),), rows=500),
            Split(
                "sanitized",
                (Origin(_MBPP, ("sanitized/test-*.parquet",), local=("*sanitized*",)),),
                rows=257,
                usual=False,
            ),
        ),
        columns={
            "question": ("text", "prompt"),
            "tests": ("test_list",),
            "setup": ("test_setup_code", "test_imports"),
            "code": ("code",),
            "id": ("task_id",),
        },
        recipes=(),
        ability="code",
        note="The prompt shows the tests. They run in the program's process: to evaluate, not to train.",
    ),
    Published(
        name="mbpp_plus",
        title="MBPP+",
        licence="Apache-2.0",
        kind="mbpp",
        data_source="mbpp_plus",
        grader=PROGRAMS,
        splits=(Split("test", one("evalplus/mbppplus", "data/test-*.parquet"), rows=378),),
        columns={
            "question": ("prompt",),
            "shown": ("test_list",),
            "tests": ("test",),
            "code": ("code",),
            "id": ("task_id",),
        },
        recipes=(),
        ability="code",
        note="As MBPP; the prompt shows MBPP's tests, EvalPlus's grade.",
    ),
    Published(
        name="rstar_coder",
        title="rStar-Coder, seed problems",
        licence="CC BY 4.0",
        kind="bare",
        data_source="rstar_coder",
        grader="",
        splits=(
            Split("passed", _RSTAR, (Keep("is_passed", (True,)),), rows=10_167),
            Split("all", _RSTAR, usual=False),
        ),
        columns={"question": ("question",), "starter_code": ("starter_code",), "id": ("question_id",)},
        recipes=("ssd",),
        ability="code",
        distinct="spaces",
        note="Prompts alone, without reference. Which SSD used is ambiguous: the text says about 10,168 after exact "
        "de-duplication, which leaves more than 30,000; 10,167 remain if `is_passed` counts (apple/ml-ssd#7).",
    ),
)
