# SPDX-License-Identifier: Apache-2.0
"""Sets of mathematics; see :mod:`opd_ext.data.catalogue`."""

from __future__ import annotations

from dataclasses import replace

from opd_ext.data.published import Keep, Origin, Published, Split, one

MATHS = "pkg://opd_ext.rewards.math_dual"
_TRAINERS = ("crisp", "grpo", "opd", "iw_opd", "sdpo", "trace")

_DAPO = (
    Origin(
        "YouJiacheng/DAPO-Math-17k-dedup",
        ("distinct-prompts-with-rewards.parquet",),
        revision="6e26a33abdabd3e6aaa1d742326b790758f7dbc5",
        sha256="c65f47247b9b13cb62321462243c2d1fe8d4ede2d800644a7dda61fea76d4286",
        local=("*distinct-prompts-with-rewards*", "*dapo*"),
    ),
)
_AIME24 = Origin(
    "math-ai/aime24",
    ("test-00000-of-00001.parquet",),
    revision="83a7f387baaa524a8bda0022eac0541582297103",
    sha256="2602156eb2a0ab64393dc46617a3bfee3451ae3c985a7ea6ac2b55436e094a38",
    local=("*aime*24*",),
)
_AIME25 = Origin(
    "math-ai/aime25",
    ("test.jsonl",),
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    local=("*aime*25*",),
)
_AIME = {"question": ("problem", "question"), "answer": ("answer",), "box": ("solution",)}
_OPENMATH, _OPENMATH_AT = "nvidia/OpenMathReasoning", "d3d08664755704f422af97d43a7ff0ded4bd95df"
_ANSWERED = Keep("problem_type", ("has_answer_extracted",))
_DEEPMATH = one("zwhe99/DeepMath-103K", "data/train-*.parquet")

SETS = (
    Published(
        name="dapo_math_17k",
        title="DAPO-Math-17k",
        licence="Apache-2.0",
        kind="maths",
        data_source="math_dapo",
        grader=MATHS,
        splits=(Split("train", _DAPO, rows=13_918, asks=True), Split("val", _DAPO, rows=3_480, asks=True)),
        # `prompt` is a chat or its text, in DAPO's own wording; the processed variants have `solution` for the answer.
        columns={"question": ("prompt", "question", "problem"), "answer": ("reward_model", "answer", "solution")},
        recipes=(*_TRAINERS, "cispo"),
        wording="dapo",
        distinct="exact",
        held_out=0.2,
        evaluated="val",
        note="Also reads the first file, BytedTsinghua-SIA/DAPO-Math-17k, 1,791,700 rows that hold each question a "
        "hundred times: the first copy stays. Its split is another one than the published, which is of the file above.",
    ),
    Published(
        name="math500",
        title="MATH-500",
        licence="MIT",
        kind="maths",
        data_source="math500",
        grader=MATHS,
        splits=(Split("test", one("HuggingFaceH4/MATH-500", "test.jsonl"), rows=500),),
        columns={**_AIME, "difficulty": ("level",), "id": ("unique_id",)},
        recipes=("crisp", "grpo", "sdpo", "trace"),
        wording="dapo",
    ),
    Published(
        name="aime24",
        title="AIME 2024",
        licence="Apache-2.0",
        kind="maths",
        data_source="aime24",
        grader=MATHS,
        splits=(Split("test", (_AIME24,), rows=30),),
        columns=_AIME,
        recipes=(*_TRAINERS, "cispo", "opsd"),
        wording="dapo",
        note="The answer is the box of `solution`, there is no other.",
    ),
    Published(
        name="aime25",
        title="AIME 2025",
        licence="Apache-2.0",
        kind="maths",
        data_source="aime25",
        grader=MATHS,
        splits=(Split("test", (_AIME25,), rows=30),),
        columns=_AIME,
        recipes=(*_TRAINERS, "opsd"),
        wording="dapo",
    ),
    Published(
        name="aime",
        title="AIME 2024 and 2025 in one file",
        licence="Apache-2.0",
        kind="maths",
        data_source="aime",
        grader=MATHS,
        splits=(Split("test", (replace(_AIME24, difficulty="2024"), replace(_AIME25, difficulty="2025")), rows=60),),
        columns=_AIME,
        recipes=("t3s",),
        wording="dapo",
        note="The year is the difficulty, so that reports have a column for each.",
    ),
    Published(
        name="amc23",
        title="AMC 2023",
        licence="Apache-2.0",
        kind="maths",
        data_source="amc23",
        grader=MATHS,
        splits=(
            Split(
                "test",
                one(
                    "math-ai/amc23",
                    "test-00000-of-00001.parquet",
                    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
                    sha256="b696e87ba47be4e879a60fd4ef1d4aa522ba78c5ae013c6aff5cc9788a397c5e",
                ),
                rows=40,
            ),
        ),
        columns={"question": ("question", "problem"), "answer": ("answer",)},
        recipes=("trace",),
        wording="dapo",
    ),
    Published(
        name="hmmt25",
        title="HMMT February 2025",
        licence="CC BY-NC-SA 4.0",
        kind="maths",
        data_source="hmmt25",
        grader=MATHS,
        splits=(Split("test", one("MathArena/hmmt_feb_2025", "data/train-00000-of-00001.parquet"), rows=30),),
        columns={"question": ("problem",), "answer": ("answer",), "id": ("problem_idx",)},
        recipes=("opd", "iw_opd", "opsd"),
        wording="dapo",
    ),
    Published(
        name="openthoughts_math_30k",
        title="OpenThoughts-math-30k, OPSD's training set",
        licence="see its card",
        kind="maths",
        data_source="openthoughts",
        grader=MATHS,
        splits=(
            Split("train", one("siyanzhao/Openthoughts_math_30k_opsd", "data/train-*.parquet"), rows=29_434, asks=True),
        ),
        columns={
            "question": ("problem",),
            "answer": ("Answer", "answer"),
            "box": ("solution",),
            "solution": ("solution",),
        },
        recipes=("opsd", "variants"),
        wording="opsd",
        note="`solution` is what the teacher reads. Rows without an answer are dropped, so there may be fewer.",
    ),
    Published(
        name="openthoughts",
        title="OpenThoughts-114k, mathematics, with R1's traces",
        licence="Apache-2.0",
        kind="maths",
        data_source="openthoughts",
        grader=MATHS,
        splits=(
            Split(
                "train",
                one("open-thoughts/OpenThoughts-114k", "metadata/*.parquet"),
                (Keep("domain", ("math",)),),
                asks=True,
            ),
        ),
        columns={
            "question": ("problem",),
            "box": ("ground_truth_solution",),
            "solution": ("ground_truth_solution",),
            "thoughts": ("deepseek_reasoning",),
            "trace": ("deepseek_solution",),
        },
        recipes=("trace", "grpo"),
        wording="boxed",
        thinking=True,
        note="TRACE trains on up to 30,000 of its rows and does not say which: `--count 30000` takes the first.",
    ),
    Published(
        name="openmathreasoning",
        title="OpenMathReasoning, with traces of R1 and QwQ",
        licence="CC BY 4.0",
        kind="maths",
        data_source="openmathreasoning",
        grader=MATHS,
        splits=(
            Split("cot", one(_OPENMATH, "data/cot-*.parquet", revision=_OPENMATH_AT), (_ANSWERED,), asks=True),
            Split(
                "tir", one(_OPENMATH, "data/tir-*.parquet", revision=_OPENMATH_AT), (_ANSWERED,), usual=False, asks=True
            ),
        ),
        columns={
            "question": ("problem",),
            "answer": ("expected_answer",),
            "difficulty": ("pass_rate_72b_tir",),
            "trace": ("generated_solution",),
        },
        recipes=("t3s",),
        wording="boxed",
        note="`cot` has 3,201,061 rows and 72 GB before the filter: `--count` fetches as many files as it needs.",
    ),
    Published(
        name="deepmath",
        title="DeepMath-103K",
        licence="MIT",
        kind="maths",
        data_source="deepmath",
        grader=MATHS,
        splits=(
            Split("train", _DEEPMATH, (Keep("difficulty", at_least=6),), asks=True),
            Split("all", _DEEPMATH, usual=False, asks=True),
        ),
        columns={"question": ("question",), "answer": ("final_answer",), "difficulty": ("difficulty",)},
        recipes=("opd", "iw_opd"),
        wording="boxed",
        note="IW-OPD trains on about 57,000 questions of difficulty 6 and above.",
    ),
    Published(
        name="boba200",
        title="BOBA-200",
        licence="Apache-2.0",
        kind="maths",
        data_source="boba200",
        grader=MATHS,
        splits=(
            Split(
                "train",
                one("inclusionAI/AReaL-RL-Data", "data/boba-sft_200_0319.jsonl"),
                rows=200,
                asks=True,
            ),
        ),
        columns={
            "question": ("prompt", "question", "problem"),
            "answer": ("solutions",),
            "box": ("answer", "trace"),
            "trace": ("answer", "trace"),
        },
        recipes=("t3s",),
        wording="boxed",
        note="Later published as AReaL-boba-SFT-200.jsonl of inclusionAI/AReaL-boba-Data. Without `solutions` the "
        "reference is the trace's own box. The traces may come from another teacher than T3S's: name it.",
    ),
    Published(
        name="s1k",
        title="s1K-1.1 with R1's traces",
        licence="MIT",
        kind="maths",
        data_source="s1k",
        grader=MATHS,
        splits=(
            Split(
                "train",
                one("simplescaling/s1K-1.1", "data/train-*.parquet"),
                (Keep("cot_type", ("math",)), Keep("deepseek_grade", ("Yes",))),
                asks=True,
            ),
        ),
        columns={
            "question": ("question",),
            "text": ("solution",),
            "thoughts": ("deepseek_thinking_trajectory",),
            "trace": ("deepseek_attempt",),
        },
        recipes=("t3s",),
        wording="boxed",
        longest_answer=60,
        note="The reference is the box of `solution`, or all of it where that is an answer, not a proof. Traces have "
        "no thinking tags: LLaDA2.0-mini has none.",
    ),
)
